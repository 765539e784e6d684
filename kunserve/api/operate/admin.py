"""What operators do by hand: POST /kunserve/drop and /kunserve/restore, with the admin key as a bearer token."""

from __future__ import annotations

from aiohttp import web

from kunserve.api.ask.declared.check import read
from kunserve.api.ask.declared.others import Groups
from kunserve.api.wire.access import bearer, is_key
from kunserve.api.wire.body import read_body
from kunserve.api.wire.context import API, json_response
from kunserve.errors import ForbiddenError, UnauthorizedError


def check_admin(request: web.Request) -> None:
    """Raise unless the request carries the admin key."""
    keys = request.app[API].settings.admin_keys
    if not keys:
        raise ForbiddenError("This server was started without --admin-key, so nobody may do this.")
    if not is_key(bearer(request), keys):
        raise UnauthorizedError("The admin key is missing or wrong (send it as `Authorization: Bearer KEY`).")


async def drop(request: web.Request) -> web.Response:
    """POST /kunserve/drop: merge the groups that `groups` names, or the two smallest; answers when committed."""
    check_admin(request)
    return json_response(await request.app[API].backend.drop(await _groups(request)))


async def restore(request: web.Request) -> web.Response:
    """POST /kunserve/restore: split the groups that `groups` names, or the largest; answers when committed."""
    check_admin(request)
    return json_response(await request.app[API].backend.restore(await _groups(request)))


async def _groups(request: web.Request) -> list[int] | None:
    if not request.can_read_body:
        return None
    return (await read_body(request, request.app[API], lambda values: read(values, Groups))).groups
