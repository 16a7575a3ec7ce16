"""A voice agent's mouth: sentences are spoken while the next ones are still being written.

Run: python examples/voice_agent.py. ``write`` stands for a language model, ``play`` for a sound card.
"""

import asyncio

import chatterbox_turbo as turbo

ANSWER = "Of course. I can book a table for two. Would seven in the evening suit you?"


async def write(answer):
    """Words as a language model gives them."""
    for word in answer.split():
        await asyncio.sleep(0.01)
        yield word + " "


async def sentences(words):
    """Whole sentences of a stream of words: what can be spoken without knowing what follows."""
    so_far = ""
    async for word in words:
        so_far += word
        if so_far.rstrip().endswith((".", "!", "?")):
            yield so_far.strip()
            so_far = ""
    if so_far.strip():
        yield so_far.strip()


async def speak(model, words, play):
    """Speaks what is written; cancel the task to fall silent (somebody has begun to talk)."""
    seed = 0
    async for sentence in sentences(words):
        stream = model.turbo.stream(sentence, seed=seed)
        try:
            async for samples, metrics in stream:  # the event loop goes on meanwhile
                await play(samples, metrics)
        finally:
            await stream.aclose()
        seed += 1


async def main():
    model = turbo.apply(turbo.synthetic.build("turbo", "tiny"), "fast")

    async def play(samples, metrics):
        seconds = samples.shape[-1] / model.sr
        print(f"{seconds:.2f} s of speech, the first of its sentence after {metrics.first_audio:.2f} s")

    await speak(model, write(ANSWER), play)


if __name__ == "__main__":
    asyncio.run(main())
