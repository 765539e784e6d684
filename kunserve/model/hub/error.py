"""Model files: what went wrong with the Hub, as one line that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from huggingface_hub import constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

LOG_IN = "(HF_TOKEN, or `hf auth login`)"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def explain(error: BaseException, hub_id: str, again: str = "start again later") -> str:
    """Return one line for what the library has raised for `hub_id`: its classes count, its texts change.

    `again` is the advice for what passes by itself.
    """
    for link in _chain(error):
        match link:
            case GatedRepoError():  # before the class that it derives from
                return _gated(hub_id)
            case RepositoryNotFoundError():
                return _not_found(hub_id)
            case HfHubHTTPError():
                return _http(link, hub_id, again)
            case OSError() if link.errno in NOT_WRITABLE:
                path = link.filename or constants.HF_HUB_CACHE
                return f"cannot write {path}: {link.strerror}; set HF_HOME to a folder that has room and is yours"
    return f"cannot fetch {hub_id} from {constants.ENDPOINT} ({_reason(error)}): {again}, or give a local folder"


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a full disk or a quota is behind `error`."""
    return any(isinstance(link, OSError) and link.errno in DISK_FULL for link in _chain(error))


def _gated(hub_id: str) -> str:
    page = f"{constants.ENDPOINT}/{hub_id}"
    if get_token() is None:
        return f"{hub_id} is gated: accept its licence on {page} and give a token of that account {LOG_IN}"
    accept = f"accept its licence on {page} with that account"
    return f"{hub_id} is gated, and the account of the token may not read it: {accept}, or give another token {LOG_IN}"


def _not_found(hub_id: str) -> str:
    private = f"if it is private, give a token that may read it {LOG_IN}"
    return f"{constants.ENDPOINT} has no model {hub_id}, or none that you may see: check the spelling; {private}"


def _http(error: HfHubHTTPError, hub_id: str, again: str) -> str:
    host, response = constants.ENDPOINT, error.response
    status = f"{response.status_code} {response.reason_phrase}".strip()
    match response.status_code:
        case 401 if get_token() is None:
            return _not_found(hub_id)
        case 401 | 403:
            return f"{host} refuses the token for {hub_id} ({status}): give one that is valid and may read it {LOG_IN}"
        case 429:
            seconds = response.headers.get("Retry-After", "")
            wait = f"wait {seconds} s" if seconds.isdigit() else "wait some minutes"
            more = "" if get_token() else f", or give a token, which raises the limit {LOG_IN}"
            return f"{host} takes no more requests from here for {hub_id} ({status}): {wait}, then {again}{more}"
        case code if code >= 500:
            return f"{host} has failed at {hub_id} ({status}): {again}"
    return f"{host} answers {status} for {hub_id}: is HF_ENDPOINT the address of a Hub?"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and whatever is behind it, the outermost first."""
    waiting, seen = [error], set()
    while waiting:
        link = waiting.pop(0)
        if id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting += [behind for behind in (link.__cause__, link.__context__) if behind is not None]


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost cause: what a socket says is clearer than five wrappers of it."""
    for innermost in _chain(error):
        error = innermost
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
