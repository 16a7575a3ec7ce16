"""What is answered instead of speech: a status, and an error in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.responses import JSONResponse, Response

from ..errors import InvalidRequestError, ReferenceAudioError, TurboError, brief
from .worker import BusyError

logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # nobody reads it; as nginx logs it


class Refusal(HTTPException):
    """A request that is not carried out; ``code``: for programs, ``param``: which part of the request."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param

    def response(self) -> Response:
        """What is sent."""
        return answer(self.status_code, self.detail, self.code, self.param, self.headers)


class ClientGone(Exception):
    """Whoever asked has closed the connection."""


class _Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")  # a lone surrogate of the request has no UTF-8


def answer(
    status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """An error as JSON."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return _Json({"error": error}, status, dict(headers or {}))


def refused(error: Exception) -> Refusal:
    """The refusal that an error of the model or of the queue means."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, BusyError):
        return Refusal(429, f"The server is busy: {error}.", "busy", headers={"Retry-After": str(error.after)})
    if isinstance(error, ReferenceAudioError):
        return Refusal(400, str(error), "invalid_recording", "audio_sample")
    if isinstance(error, InvalidRequestError):
        return Refusal(400, str(error), "invalid_request")
    if isinstance(error, ConnectionAbortedError):
        return Refusal(503, "The server is shutting down.", "shutting_down", headers={"Connection": "close"})
    logger.error("A request failed.", exc_info=error)
    what = error.what if isinstance(error, TurboError) else "The model failed."
    return Refusal(500, what, "model_failed")


def install(app: FastAPI) -> None:
    """Have an app answer with these."""

    @app.exception_handler(AnyHTTPException)
    async def _refusal(request: Request, error: AnyHTTPException) -> Response:
        if isinstance(error, Refusal):
            return error.response()
        codes = {404: "not_found", 405: "method_not_allowed"}
        return answer(
            error.status_code, str(error.detail), codes.get(error.status_code, "bad_request"), None, error.headers
        )

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return answer(400, f"{brief(place)}: {first['msg']}.", "invalid_request", place[:100])

    @app.exception_handler(ClientGone)
    async def _gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> Response:
        return answer(500, "The server failed; its log says why.", "internal_error")
