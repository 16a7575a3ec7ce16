"""The routes of one server, over one optimized model."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from .. import __version__
from ..budget.measurement import slots_within
from ..upstream.families import identify
from . import answers, audio, recordings, refusals
from .gate import OPEN, VOICES, Gate, Status
from .limits import Limits
from .measures import Measures
from .refusals import Refusal, refused
from .request import ALIASES, LARGEST_SEED, SpeechRequest, arguments
from .voices import ServedVoices
from .worker import BusyError, SpeechWorker

UPLOADS = 4  # at once
SPEECH, MODELS = "/v1/audio/speech", "/v1/models"
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
# nothing of the page comes from elsewhere, and nobody shows it in a frame
GUARDED = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; media-src blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class SpeechServer:
    """One model behind HTTP: ``app`` is what an ASGI server runs.

    Args:
        model: optimized, with a pipeline that streams; ``decoding.streams`` is as many as ``limits.slots``.
        folder: of voices; it exists.
        key: what clients must send; ``None``: nothing.

    Raises:
        VoiceFileError: a voice of the folder is damaged or of another model.
        InvalidRequestError: ``limits.slots`` are more than the model's memory budget was planned for.
    """

    def __init__(self, model: Any, folder: Path | None = None, limits: Limits | None = None, key: str | None = None):
        self.limits, self.status = limits or Limits(), Status()
        slots_within(model.turbo.config, self.limits.slots)
        parts = identify(model)
        self.family, self._rate = parts.family, model.sr
        known = getattr(type(model), "get_supported_languages", dict)
        self._languages = tuple(sorted(known())) if parts.family == "multilingual" else ()
        self.voices = ServedVoices(model, folder, self.limits)
        self._formats = audio.available()
        self.worker = SpeechWorker(model, self.limits.slots, self.limits.queue)
        self.measures = Measures(lambda: self.worker.waiting, lambda: self.worker.in_flight)
        self._since, self._uploads = int(time.time()), 0

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.worker.close)

        # the interactive documentation loads its scripts from elsewhere
        self.app = app = FastAPI(
            title="chatterbox-turbo",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            lifespan=lifespan,
        )
        routes = (*OPEN, SPEECH, VOICES, MODELS, "/metrics", "/openapi.json")
        app.add_middleware(
            Gate,
            limits=self.limits,
            status=self.status,
            measures=self.measures,
            key=None if key is None else key.encode(),
            routes=routes,
        )
        refusals.install(app)
        app.post(SPEECH, response_class=Response)(self.speech)
        app.get(MODELS)(self.models)
        app.get(VOICES)(self.list_voices)
        app.post(VOICES, status_code=201)(self.add_voice)
        app.delete(VOICES + "/{name}")(self.remove_voice)
        app.get("/metrics", response_class=Response)(self.metrics)
        for path in ("/health", "/health/live", "/health/ready"):
            app.get(path)(self.ready if path == "/health/ready" else self.health)
        for path, (file, kind) in PAGE.items():
            content = resources.files(__package__).joinpath("page", file).read_bytes()
            app.add_api_route(path, _page(content, kind), include_in_schema=False)

    async def speech(self, asked: SpeechRequest, request: Request) -> Response:
        """Speak."""
        given = arguments(asked, self.family, self._languages, self.limits)
        if asked.response_format not in self._formats:
            known = ", ".join(self._formats)
            message = f"This server's libsndfile does not write {asked.response_format}, but {known}."
            raise Refusal(400, message, "invalid_request", "response_format")
        seed = random.SystemRandom().randint(0, LARGEST_SEED) if asked.seed is None else asked.seed
        await self._looked()
        given |= {"seed": seed, **self.voices.argument(asked.voice)}
        try:
            job = self.worker.submit(given, asked.streams)
        except Exception as error:
            raise refused(error) from None
        blocks = answers.observed(job, self.measures)
        headers = {"X-Seed": str(seed), "X-Sample-Rate": str(self._rate)}
        if not asked.streams:
            return await answers.whole(request, blocks, asked.response_format, self._rate, headers)
        events = asked.stream_format == "sse"
        return await answers.streamed(request, blocks, asked.response_format, self._rate, headers, events)

    async def models(self) -> dict[str, Any]:
        """The model, and the names that stand for it."""
        rows = [
            {"id": name, "object": "model", "created": self._since, "owned_by": "chatterbox-turbo"}
            for name in (self.family, *ALIASES)
        ]
        return {"object": "list", "data": rows}

    async def list_voices(self) -> dict[str, Any]:
        """Voices by name."""
        await self._looked()
        return {"object": "list", "voices": self.voices.listed()}

    async def add_voice(self, request: Request) -> dict[str, Any]:
        """Keep a recording (a form with ``name`` and ``audio_sample``) as a voice."""
        if self._uploads >= UPLOADS:  # each may hold a whole recording in memory
            raise refused(BusyError(f"{UPLOADS} recordings are being received", 5))
        self._uploads += 1
        try:
            name, recording = await recordings.form(request, self.limits)
            return {"object": "audio.voice", "id": await self._told(lambda: self.voices.add(name, recording))}
        finally:
            self._uploads -= 1

    async def remove_voice(self, name: str) -> dict[str, Any]:
        """Forget a voice."""
        gone = await self._told(lambda: self.voices.remove(name))
        return {"object": "audio.voice", "id": gone, "deleted": True}

    async def _looked(self) -> None:
        """Know what others have done to the folder of voices."""
        if self.voices.stale:
            with suppress(BusyError):  # later, then
                await self.worker.call(self.voices.refresh)

    async def _told(self, function: Any) -> Any:
        try:
            return await self.worker.call(function)
        except Exception as error:
            raise refused(error) from None

    async def health(self) -> dict[str, Any]:
        """Alive, whatever else."""
        return {"status": "ok", "model": self.family, "ready": self.takes_requests}

    async def ready(self) -> JSONResponse:
        """Whether requests are taken."""
        return JSONResponse({"ready": self.takes_requests}, 200 if self.takes_requests else 503)

    @property
    def takes_requests(self) -> bool:
        """Not while it ends, and not without the thread that speaks."""
        return self.worker.alive and not self.status.draining

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(self.measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _page(content: bytes, kind: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=kind, headers=GUARDED)

    return page
