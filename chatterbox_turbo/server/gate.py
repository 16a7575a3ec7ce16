"""Before every route: is the server taking requests, may this one come in, and is its body of a size to be read."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import Limits
from .measures import Measures
from .refusals import Refusal

VOICES = "/v1/audio/voices"
OPEN = ("/", "/page.js", "/page.css", "/health", "/health/live", "/health/ready")  # without a key: what says nothing
LIVING = ("/health", "/health/live", "/health/ready", "/metrics")  # also answered while the server ends
CLOSE = {"Connection": "close"}


@dataclass
class Status:
    """``draining``: the server ends; what is in flight may finish."""

    draining: bool = False


class Gate:
    """ASGI middleware.

    Args:
        key: what ``Authorization: Bearer`` must hold; ``None`` where nothing is asked for.
        routes: for the metrics; the rest counts as ``other``.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        status: Status,
        measures: Measures,
        key: bytes | None = None,
        routes: Iterable[str] = (),
    ):
        self._app, self._limits, self._status, self._measures = app, limits, status, measures
        self._key, self._routes = key, {*routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers = scope["path"], dict(reversed(scope["headers"]))  # the first of each name
        route = path if path in self._routes else VOICES + "/{name}" if path.startswith(VOICES + "/") else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._measures.responses.labels(route, str(message["status"])).inc()
            await send(message)

        limit = self._limits.form if path == VOICES else self._limits.body
        refusal = self._why_not(scope, path, headers, limit)
        if refusal is not None:
            await refusal.response()(scope, receive, counted)
            return
        await self._app(scope, _Bounded(receive, limit, self._limits.receiving), counted)

    def _why_not(self, scope: Scope, path: str, headers: dict[bytes, bytes], limit: int) -> Refusal | None:
        if self._status.draining and path not in LIVING:
            return Refusal(503, "The server is shutting down.", "shutting_down", headers={**CLOSE, "Retry-After": "5"})
        # no page of another site may have a visitor's browser speak or upload here
        if scope["method"] not in ("GET", "HEAD") and _of_another_site(headers):
            return Refusal(403, "Pages of other sites may not do this.", "cross_site")
        if self._key is not None and path not in OPEN and not self._has_key(headers):
            bearer = {"WWW-Authenticate": "Bearer"}
            return Refusal(401, "Send Authorization: Bearer and the server's key.", "invalid_api_key", headers=bearer)
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > limit:
            return _too_large(limit)
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        # as long for a wrong key as for the right one
        return hmac.compare_digest(given.strip(), self._key or b"") and kind.lower() == b"bearer"


def _of_another_site(headers: dict[bytes, bytes]) -> bool:
    """Whether a page of another site has sent this, by what browsers say of that."""
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None or origin is None:
        return site == b"cross-site"
    # to an address that is neither https nor this machine's own they say where the page is from, and no more
    hosts = (headers.get(name, b"").lower() for name in (b"host", b"x-forwarded-host"))
    return origin.lower().partition(b"://")[2] not in {*hosts} - {b""}


class _Bounded:
    """What an app receives of a body: so many bytes at most, within so many seconds."""

    def __init__(self, receive: Receive, limit: int, seconds: float):
        self._receive, self._limit, self._seconds = receive, limit, seconds
        self._count, self._until, self._complete = 0, 0.0, False

    async def __call__(self) -> Any:
        if self._complete:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._until = self._until or now + self._seconds
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._until - now))
        except asyncio.TimeoutError:
            raise Refusal(408, "The body of the request did not come in time.", "slow_body", headers=CLOSE) from None
        self._count += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._count > self._limit:
            raise _too_large(self._limit)
        return message


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"The body of the request has more than {limit:,} bytes.", "too_large", headers=CLOSE)
