"""What operators do by hand, with the admin key as a bearer token: POST /kunserve/drop, /kunserve/restore, and
/kunserve/devices/{index}/remove and /add.
"""

from __future__ import annotations

from typing import TypeVar

from aiohttp import web
from msgspec import Struct

from kunserve.api.ask.declared.check import read
from kunserve.api.ask.declared.others import Drop, Groups, Remove
from kunserve.api.wire.access import bearer, is_key
from kunserve.api.wire.body import read_body
from kunserve.api.wire.context import API, OPERATED, json_response
from kunserve.errors import ForbiddenError, NotFoundError, UnauthorizedError

Asked = TypeVar("Asked", bound=Struct)


def check_admin(request: web.Request) -> None:
    """Raise unless the request carries the admin key."""
    keys = request.app[API].settings.admin_keys
    if not keys:
        raise ForbiddenError("This server was started without --admin-key, so nobody may do this.")
    if not is_key(bearer(request), keys):
        raise UnauthorizedError("The admin key is missing or wrong (send it as `Authorization: Bearer KEY`).")


async def drop(request: web.Request) -> web.Response:
    """Answer POST /kunserve/drop: merge the groups that `groups` names, or the two smallest; answers when committed.

    409 if live requests would have to be computed again for it, unless `force` is true.
    """
    check_admin(request)
    asked = await _read(request, Drop)
    return json_response(await request.app[OPERATED].backend.drop(asked.groups, is_forced=asked.force))


async def restore(request: web.Request) -> web.Response:
    """Answer POST /kunserve/restore: split the groups that `groups` names, or the largest; answers when committed."""
    check_admin(request)
    return json_response(await request.app[OPERATED].backend.restore((await _read(request, Groups)).groups))


async def remove_device(request: web.Request) -> web.Response:
    """Answer POST /kunserve/devices/{index}/remove: take a device out; its requests have `drain_s` seconds to end."""
    check_admin(request)
    index = _device_index(request)
    asked = await _read(request, Remove)
    return json_response(await request.app[OPERATED].backend.remove_device(index, asked.drain_s))


async def add_device(request: web.Request) -> web.Response:
    """Answer POST /kunserve/devices/{index}/add: take a device in that was removed or lost."""
    check_admin(request)
    return json_response(await request.app[OPERATED].backend.add_device(_device_index(request)))


def _device_index(request: web.Request) -> int:
    """Return the index that a path names; NotFoundError if there is no such device."""
    asked = request.match_info["index"]
    names = {str(index): device.name for index, device in enumerate(request.app[OPERATED].backend.stats().devices)}
    if asked not in names:
        known = ", ".join(f"{index} ({name})" for index, name in names.items())
        raise NotFoundError(f"There is no device `{asked[:100]}`: devices are {known}.")
    return int(asked)


async def _read(request: web.Request, declared: type[Asked]) -> Asked:
    """Read a body that may be left out."""
    if not request.can_read_body:
        return declared()
    return await read_body(request, request.app[API], lambda values: read(values, declared))
