"""Blocks of samples to bodies of responses: whole, as bytes while they are made, or as events."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import InvalidRequestError
from . import audio
from .measures import Measures
from .refusals import ClientGone, refused
from .worker import Block, Job

Result = TypeVar("Result")
Blocks = AsyncGenerator[Block, None]


async def observed(job: Job, measures: Measures) -> Blocks:
    """The blocks of a job, counted; whoever stops reading cancels it."""
    outcome, seconds, tokens, heard = "cancelled", 0.0, 0, "yes" if job.live else "no"
    try:
        async for samples, metrics in job.blocks():
            if not seconds:
                measures.first_audio.labels(heard).observe(time.perf_counter() - job.arrived)
                measures.queued.observe(job.begun - job.arrived)
            measures.audio.inc(metrics.seconds - seconds)
            measures.tokens.inc(metrics.tokens - tokens)
            seconds, tokens = metrics.seconds, metrics.tokens
            yield samples, metrics
        outcome = "done"
    except Exception as error:
        outcome = "refused" if isinstance(error, InvalidRequestError) else "failed"
        raise
    finally:
        job.cancel()
        measures.ended(outcome, time.perf_counter() - (job.begun or job.arrived), seconds)


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, which is cancelled where the client leaves.

    Raises:
        ClientGone: it has left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, blocks: Blocks, name: str, rate: int, headers: Mapping[str, str]) -> Response:
    """All of it, with its length.

    Raises:
        ClientGone, Refusal: nothing was made, or nobody wants it.
    """

    async def collected() -> list[Block]:
        return [block async for block in blocks]

    try:
        async with aclosing(blocks):
            every = await unless_gone(request, collected())
    except (ClientGone, asyncio.CancelledError):
        raise
    except Exception as error:
        raise refused(error) from None
    samples = np.concatenate([one[0].numpy() for one, _ in every] or [np.zeros(0, np.float32)])
    body = await asyncio.to_thread(audio.whole, name, samples, rate)
    seconds = f"{len(samples) / rate:.3f}"
    return Response(body, media_type=audio.content_type(name), headers={**headers, "X-Audio-Seconds": seconds})


async def streamed(
    request: Request, blocks: Blocks, name: str, rate: int, headers: Mapping[str, str], events: bool
) -> Response:
    """What comes as it comes, once there is a first block: before, a status can tell what is wrong.

    Raises:
        ClientGone, Refusal: nothing was made, or nobody wants it.
    """

    async def one() -> Block | None:
        return await anext(blocks, None)

    try:
        first = await unless_gone(request, one())
    except BaseException as error:
        await blocks.aclose()
        if isinstance(error, ClientGone) or not isinstance(error, Exception):
            raise
        raise refused(error) from None
    body = _events(first, blocks, name, rate) if events else _bytes(first, blocks, name, rate)
    kind = "text/event-stream" if events else audio.content_type(name)
    return _Spoken(blocks, body, media_type=kind, headers={**headers, "X-Accel-Buffering": "no"})


class _Spoken(StreamingResponse):
    """A response whose blocks are let go of however it ends, and which is cut where they cannot go on.

    Without the end of a chunked body a client knows that something is missing.
    """

    def __init__(self, blocks: Blocks, body: AsyncGenerator[bytes, None], **options: Any):
        super().__init__(body, **options)
        self._blocks, self._body = blocks, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except _CutError:
            return  # with the body not complete: the connection is closed
        finally:
            await self._body.aclose()
            await self._blocks.aclose()


class _CutError(Exception):
    """Speech ends before its end, for a reason that was logged."""


async def _bytes(first: Block | None, blocks: Blocks, name: str, rate: int) -> AsyncGenerator[bytes, None]:
    encoder = audio.Encoder(name, rate)
    try:
        async for samples, _ in _with(first, blocks):
            if part := encoder.push(samples[0].numpy()):
                yield part
        if part := encoder.finish():
            yield part
    except Exception as error:
        refused(error)  # logs what is the server's
        raise _CutError from None
    finally:
        encoder.close()


async def _events(first: Block | None, blocks: Blocks, name: str, rate: int) -> AsyncGenerator[bytes, None]:
    """OpenAI's events, with the tokens and seconds in the last one."""
    encoder, seconds, tokens = audio.Encoder(name, rate), 0.0, 0
    try:
        async for samples, metrics in _with(first, blocks):
            seconds, tokens = metrics.seconds, metrics.tokens
            if part := encoder.push(samples[0].numpy()):
                yield _event("speech.audio.delta", audio=base64.b64encode(part).decode())
        if part := encoder.finish():
            yield _event("speech.audio.delta", audio=base64.b64encode(part).decode())
        yield _event("speech.audio.done", usage={"output_tokens": tokens}, audio_seconds=seconds)
    except Exception as error:
        refusal = refused(error)
        yield _event("error", error={"message": refusal.detail, "code": refusal.code})
        raise _CutError from None
    finally:
        encoder.close()


async def _with(first: Block | None, blocks: Blocks) -> AsyncIterator[Block]:
    if first is not None:
        yield first
        async for block in blocks:
            yield block


def _event(kind: str, **data: Any) -> bytes:
    return f"data: {json.dumps({'type': kind, **data})}\n\n".encode()
