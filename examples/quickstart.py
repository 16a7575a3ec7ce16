"""One line more than upstream's own example. Run: python examples/quickstart.py [cpu|cuda] [--synthetic]."""

import sys

import soundfile

import chatterbox_turbo as turbo


def load(device: str):
    """Upstream's model, or one with random weights where there is no checkpoint to be had."""
    if "--synthetic" in sys.argv:
        return turbo.synthetic.build("english", "tiny", device=device)
    from chatterbox.tts import ChatterboxTTS

    return ChatterboxTTS.from_pretrained(device)


model = turbo.apply(load("cuda" if "cuda" in sys.argv else "cpu"))  # the one line
wav = model.generate("Hello there. This is upstream's own method, unchanged.")
soundfile.write("hello.wav", wav.squeeze(0).numpy(), model.sr)

print(model.turbo.report())  # what is on, what was skipped and why
turbo.revert(model)  # exactly as it was
