"""What the tests of reference voices share: recordings, and looking at the voice of a model."""

from __future__ import annotations

import io

import soundfile
import torch
from cases import CASES

from chatterbox_turbo.upstream.families import identify

EXACT, ONEDNN = (case.config for case in CASES if case.name == "conditioning")
RATE = 24_000


def wav(samples, rate=RATE, **options):
    """A recording in memory; ``options`` of ``soundfile.write``."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **options})
    return io.BytesIO(file.getvalue())


def encode(model, file, **options):
    """Make a recording the voice of a model."""
    (model.set_target_voice if hasattr(model, "set_target_voice") else model.prepare_conditionals)(file, **options)


def voice_of(model):
    """Copies of the tensors of the model's voice by name."""
    parts = identify(model)
    named = dict(parts.voice) if parts.family == "vc" else {**vars(parts.voice.t3), **parts.voice.gen}
    return {name: v.detach().clone() if torch.is_tensor(v) else v for name, v in named.items()}


def differences(ours, reference):
    """Names of what differs in value, shape or format."""
    assert ours.keys() == reference.keys()

    def same(a, b):
        return torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(b) else a == b

    return [name for name, value in reference.items() if not same(ours[name], value)]


def encodings(model):
    """A list that grows with each encoding, and the hook to remove."""
    runs = []
    return runs, model.s3gen.speaker_encoder.head.register_forward_pre_hook(lambda *_: runs.append(1))
