"""The table of passes that every generic test runs over, and what the tests need to have a model speak."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import nn

from chatterbox_turbo import OptimizationConfig, optimized, synthetic
from chatterbox_turbo.config import FIDELITIES
from chatterbox_turbo.measure.fidelity import Comparison, Sample, arguments, compare_samples, sample
from chatterbox_turbo.upstream.families import identify

FAMILIES = ("english", "multilingual", "turbo", "vc")
SPEAKING = FAMILIES[:3]
ACOUSTIC = ("english", "turbo", "vc")  # behind the tokens multilingual is English, class by class
UPSTREAM = {"progress": "off", "backbone": "upstream"}
STATIC = {"progress": "off", "backbone": "static", "kernel": "torch"}  # the other kernels: test_decoding.py


@dataclass(frozen=True)
class Case:
    """One pass alone, the families it applies to, its promise, and what shows that it did something.

    ``observe(model, turn_on, speak)`` calls ``turn_on`` and ``speak`` and returns something that must be
    different with the pass than without. ``variant`` tells the rows of one pass apart.
    """

    name: str  # of the pass and of its section
    options: dict[str, Any]
    families: tuple[str, ...]
    promise: str
    observe: Callable[[Any, Callable[[], None], Callable[[], torch.Tensor]], Any]
    variant: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return only(self)

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


def only(*cases: Case) -> dict[str, Any]:
    """Exactly these passes demanded, every other one off; the ceiling is what they promise."""
    sections: dict[str, Any] = {name: {"enabled": False} for name, _ in OptimizationConfig().sections()}
    for case in cases:
        sections[case.name] = {"enabled": True, **case.options}
    return {"fidelity": weakest(*cases), **sections}


def weakest(*cases: Case) -> str:
    """The weakest of the cases' promises."""
    return max((case.promise for case in cases), key=FIDELITIES.index, default=FIDELITIES[0])


def _state_dict_and_bar(model, turn_on, speak):
    """Whether T3 keeps its state-dict keys (upstream's Llama loop does not) and a progress bar is drawn."""
    model.t3._modules.pop("patched_model", None)
    turn_on()
    keys = list(model.t3.state_dict())
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        speak()
    return list(model.t3.state_dict()) == keys, "/1000" in shown.getvalue()


def _said_of_a_long_text(model, turn_on, speak):
    """Samples of a text that takes more than can be said at once; random weights end it early, once a piece."""
    turn_on()
    return model.generate(**request_for(model, "The quick brown fox jumps over the lazy dog. " * 16)).size(1)


def onlooker(function):
    """A forward hook that alters nothing, and is known to: any other one keeps a layer upstream's."""
    function.__module__ = "chatterbox_turbo.tests"
    return function


def _steps_of_transformers(model, turn_on, speak):
    """How often the Transformers model computes: for every token upstream, never on the static backbone."""
    turn_on()
    calls = []
    hook = model.t3.tfmr.register_forward_pre_hook(onlooker(lambda *_: calls.append(1)))
    try:
        speak()
    finally:
        hook.remove()
    return len(calls)


def _new_hooks(model, turn_on, speak):
    turn_on()
    before = count_hooks(model.t3)
    speak()
    return count_hooks(model.t3) - before


def _survives_a_swap(model, turn_on, speak):
    """Whether the output is marked although a server replaced the watermarker by PerTh's own dummy."""
    import perth

    turn_on()
    real = model.watermarker
    model.watermarker = perth.DummyWatermarker()
    try:
        wav = speak()
    finally:
        model.watermarker = real
    return bool(real.get_watermark(wav.squeeze(0).numpy(), sample_rate=model.sr).mean() == 1.0)


def _runs_of_perths_network(model, turn_on, speak):
    """How often the watermarker's own network marks: never where a copy on the model's device does."""
    turn_on()
    calls = []
    hook = model.watermarker.perth_net.encoder.layers.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        speak()
    finally:
        hook.remove()
    return len(calls)


def _encodings_of_one_recording(model, turn_on, speak):
    """How often the speaker encoder computes while one recording is made the voice twice."""
    turn_on()
    parts = identify(model)
    attribute, encode = ("ref_dict", "set_target_voice") if parts.family == "vc" else ("conds", "prepare_conditionals")
    voice, runs = parts.voice, []
    hook = model.s3gen.speaker_encoder.head.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        for _ in range(2):
            with contextlib.suppress(RuntimeError):  # upstream's Turbo fails after it where NumPy is 2
                getattr(model, encode)(str(synthetic.reference_voice()))
    finally:
        hook.remove()
        setattr(model, attribute, voice)
    return len(runs)


def _work_before_the_first_call(model, turn_on, speak):
    runs = []
    handle = model.s3gen.flow.encoder.register_forward_pre_hook(onlooker(lambda *_: runs.append(1)))
    try:
        turn_on()
    finally:
        handle.remove()
    return len(runs)


def _clearings(model, turn_on, speak):
    """How often freed memory was given back after a request."""
    turn_on()
    before = _between(model)
    speak()
    return _between(model) - before


def _between(model):
    handle = getattr(model, "turbo", None)
    return handle.memory()["clearings"].get("between requests", {"count": 0})["count"] if handle else 0


def _weights_over_files(model, turn_on, speak):
    """Whether the vocoder's weights lie over a file without a name."""
    turn_on()
    speak()
    at = model.s3gen.mel2wav.conv_pre.bias.data_ptr()
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "(del" in line]
    return any(int(start, 16) <= at < int(end, 16) for start, end in spans)


def _runs_of(path):
    """How often upstream's module at ``path`` runs, which the pass replaces or runs once instead of in each step."""

    def observe(model, turn_on, speak):
        turn_on()
        calls = []
        hook = model.s3gen.get_submodule(path).register_forward_pre_hook(onlooker(lambda *_: calls.append(1)))
        try:
            speak()
        finally:
            hook.remove()
        return len(calls)

    return observe


CASES = (
    # one family: what it does knows nothing of any
    Case("memory", {"profile": "aggressive"}, ("turbo",), "exact", _clearings),
    Case("decoding", UPSTREAM, SPEAKING, "exact", _state_dict_and_bar, "upstream"),
    Case("decoding", STATIC, SPEAKING, "numerical", _steps_of_transformers, "static"),
    Case("alignment", {}, ("multilingual",), "exact", _new_hooks),
    Case("flow", {}, ACOUSTIC, "numerical", _runs_of("flow.decoder.estimator.time_mlp")),
    Case("text", {"target": 18.0, "retries": 0}, SPEAKING, "exact", _said_of_a_long_text),
    Case("vocoder", {}, ACOUSTIC, "exact", _runs_of("mel2wav.conv_pre")),
    Case("conditioning", {"matmul": "torch"}, FAMILIES, "exact", _encodings_of_one_recording),
    Case("conditioning", {"matmul": "onednn"}, ACOUSTIC, "numerical", _encodings_of_one_recording, "onednn"),
    Case("watermark", {}, FAMILIES, "exact", _survives_a_swap),
    Case("watermark", {"device": "model"}, ACOUSTIC, "numerical", _runs_of_perths_network, "model"),
    Case("offload", {"mode": "sequential"}, ("turbo",), "exact", _weights_over_files),
    Case("warmup", {"level": "full"}, FAMILIES, "exact", _work_before_the_first_call),
)
ROWS = [(case, family) for case in CASES for family in case.families]
TEXT = "The quick brown fox."
NO_ANALYZER = "the installed chatterbox-tts has no alignment analyzer"


def has(family: str) -> bool:
    """Whether the installed chatterbox-tts has a family, by its modules alone."""
    if family == "multilingual":
        return importlib.util.find_spec("chatterbox.mtl_tts") is not None
    if family == "turbo":
        return importlib.util.find_spec("chatterbox.tts_turbo") is not None
    if family == "nano":
        return "GPT2_small" in importlib.import_module("chatterbox.models.t3.llama_configs").LLAMA_CONFIGS
    return True


def has_analyzer() -> bool:
    """Whether the installed chatterbox-tts watches the alignment of multilingual speech; up to 0.1.7 it does."""
    return importlib.util.find_spec("chatterbox.models.t3.inference.alignment_stream_analyzer") is not None


def require(family: str) -> None:
    """Skips the test where the installed chatterbox-tts has no such family."""
    if not has(family):
        pytest.skip(f"the installed chatterbox-tts has no {family} model")


@functools.cache
def _recordings() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="recordings-")


@functools.cache
def recording(seconds: float) -> str:
    """Path of so many seconds of the reference voice: what is computed from a recording is as long as it."""
    samples, rate = soundfile.read(synthetic.reference_voice(), dtype="float32")
    path = Path(_recordings().name) / f"{seconds}.wav"
    soundfile.write(path, samples[: round(seconds * rate)], rate)
    return str(path)


def request_for(model: Any, text: str = TEXT) -> dict[str, Any]:
    """Arguments of ``generate`` for any family; voice conversion gets about as much as the others speak."""
    return arguments(identify(model), text, audio=recording(1.0))


def speak(model: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    """Samples (1, m) of one seeded generation."""
    torch.manual_seed(seed)
    return model.generate(**{**request_for(model), **options})


_upstreams: dict[Any, tuple[Sample, Any]] = {}


def upstreams(model: Any, seed: int, request: dict[str, Any]) -> Sample:
    """What upstream says to ``request_for(model)``, spoken once for a model and its voice."""
    voice = identify(model).voice
    assert not hasattr(model, "turbo")
    if (id(model), id(voice), seed) not in _upstreams:
        _upstreams[id(model), id(voice), seed] = sample(model, seed, request), (model, voice)
    return _upstreams[id(model), id(voice), seed][0]


def compare_with_kept(model: Any, config: dict[str, Any], seeds: Sequence[int]) -> list[Comparison]:
    """What ``measure.fidelity.compare`` gives, with upstream's samples spoken once for a model and its voice.

    For the session's models, which no test leaves another than it found them.
    """
    request = request_for(model)
    references = [upstreams(model, seed, request) for seed in seeds]
    with optimized(model, config):
        ours = [sample(model, seed, request) for seed in seeds]
    return [compare_samples(model, a, b) for a, b in zip(ours, references, strict=True)]


def count_hooks(module: nn.Module) -> int:
    """Forward hooks of all kinds in a tree of modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
