"""What operators do by hand: POST /kunserve/drop and /kunserve/restore, with the admin key as a bearer token."""

from __future__ import annotations

from typing import TypeVar

from aiohttp import web

from kunserve.api.ask.declared.check import read
from kunserve.api.ask.declared.others import Drop, Groups
from kunserve.api.wire.access import bearer, is_key
from kunserve.api.wire.body import read_body
from kunserve.api.wire.context import API, json_response
from kunserve.errors import ForbiddenError, UnauthorizedError

Asked = TypeVar("Asked", bound=Groups)


def check_admin(request: web.Request) -> None:
    """Raise unless the request carries the admin key."""
    keys = request.app[API].settings.admin_keys
    if not keys:
        raise ForbiddenError("This server was started without --admin-key, so nobody may do this.")
    if not is_key(bearer(request), keys):
        raise UnauthorizedError("The admin key is missing or wrong (send it as `Authorization: Bearer KEY`).")


async def drop(request: web.Request) -> web.Response:
    """POST /kunserve/drop: merge the groups that `groups` names, or the two smallest; answers when committed.

    409 if live requests would have to be computed again for it, unless `force` is true.
    """
    check_admin(request)
    asked = await _read(request, Drop)
    return json_response(await request.app[API].backend.drop(asked.groups, is_forced=asked.force))


async def restore(request: web.Request) -> web.Response:
    """POST /kunserve/restore: split the groups that `groups` names, or the largest; answers when committed."""
    check_admin(request)
    return json_response(await request.app[API].backend.restore((await _read(request, Groups)).groups))


async def _read(request: web.Request, declared: type[Asked]) -> Asked:
    """Read a body that may be left out."""
    if not request.can_read_body:
        return declared()
    return await read_body(request, request.app[API], lambda values: read(values, declared))
