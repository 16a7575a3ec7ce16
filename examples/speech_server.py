"""An HTTP endpoint that streams speech as WAV while it is made (FastAPI, which chatterbox-tts brings).

Run: uvicorn --app-dir examples speech_server:app, then curl "localhost:8000/speech?text=Hello." | aplay
"""

import struct

from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import StreamingResponse

import chatterbox_turbo as turbo

app = FastAPI()
model = turbo.apply(turbo.synthetic.build("turbo", "tiny"), "fast")
UNKNOWN = 0xFFFFFFFF  # a length that is not known yet: players read to the end


def header(rate):
    """Of a mono WAV file with 16 bits a sample, whose length nobody knows yet."""
    kind = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", UNKNOWN, b"WAVE") + kind + struct.pack("<4sI", b"data", UNKNOWN)


@app.get("/speech")
async def speech(text: str = Query(min_length=1, max_length=5000), seed: int = 0):
    stream = model.turbo.stream(text, seed=seed)
    try:
        first, _ = await anext(stream)  # what is wrong with the request shows here, while a status can be sent
    except (turbo.TurboError, StopAsyncIteration) as error:
        raise HTTPException(400, str(error)) from error

    async def body():
        try:
            yield header(model.sr) + pcm(first)
            async for samples, _ in stream:
                yield pcm(samples)
        finally:  # also where the client has gone
            await stream.aclose()

    return StreamingResponse(body(), media_type="audio/wav")


def pcm(samples):
    return (samples[0].clamp(-1, 1) * 32767).short().numpy().astype("<i2").tobytes()
