"""The table of passes that every generic test runs over, and what the tests need to look at a model."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import nn

from chatterbox_turbo import OptimizationConfig, optimized, synthetic
from chatterbox_turbo.config import FIDELITIES
from chatterbox_turbo.measure.fidelity import Comparison, Sample, arguments, compare_samples, kind_of, sample
from chatterbox_turbo.passes import ALL_PASSES
from chatterbox_turbo.patching import Journal
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


def voice_kinds(model: Any) -> dict[str, str]:
    """The kind of every tensor of the voice that is on the model, by its path."""
    return {path: kind_of(tensor) for path, tensor in _tensors(identify(model).voice)}


def _tensors(holder: Any, path: str = "voice") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(holder, torch.Tensor):
        yield path, holder
        return
    for name, value in (holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})).items():
        yield from _tensors(value, f"{path}.{name}")


@dataclass
class Snapshot:
    """Everything that ``revert`` must put back, compared with ``==``; ``kept`` keeps ids from being reused."""

    state: dict[str, Any]
    kept: list[Any] = field(default_factory=list, compare=False, repr=False)


def snapshot(model: Any) -> Snapshot:
    """Instance attributes of the model and of every object that holds a part, module by module.

    The voice is looked at by the identity and kind of its tensors, hooks by identity and order, weights by
    storage; those that a pass may lay out anew (T3's and the flow's) by identity, layout and content.
    """
    kept: list[Any] = []

    def entries(table: dict) -> dict[str, Any]:
        kept.extend(table.values())
        return {str(key): entry(value) for key, value in table.items()}

    def entry(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (id(value), value.data_ptr(), kind_of(value))
        return entries(value) if isinstance(value, dict) else id(value)

    roots = {name: getattr(model, name, None) for name in ("t3", "s3gen", "ve")}
    voice = dict(_tensors(identify(model).voice))
    kept.extend(voice.values())
    state: dict[str, Any] = {"model": entries(vars(model)), "class": entries(dict(vars(type(model))))}
    state["voice"] = {path: (id(tensor), kind_of(tensor)) for path, tensor in voice.items()}
    for root, module in roots.items():
        if module is None:
            continue
        state[f"{root}.state_dict"] = {
            key: tuple(value.shape) if _laid_out(f"{root}.{key}") else value.data_ptr()
            for key, value in module.state_dict().items()
        }
        for path, part in module.named_modules():
            attributes = dict(vars(part))
            if _laid_out(f"{root}.{path}"):
                weights = attributes.pop("_parameters") | attributes.pop("_buffers")
                kept.extend(weights.values())
                state[f"{root}.{path} weights"] = {name: _weight(value) for name, value in weights.items()}
            state[f"{root}.{path}"] = entries(attributes)
            state[f"{root}.{path} class"] = entries(dict(vars(type(part))))
            if hasattr(part, "config"):
                state[f"{root}.{path} config"] = {k: repr(v) for k, v in vars(part.config).items()}
    for owner in ("tokenizer", "watermarker"):
        if hasattr(getattr(model, owner, None), "__dict__"):
            state[owner] = entries(vars(getattr(model, owner)))
    return Snapshot(state, kept)


def _laid_out(path: str) -> bool:
    return f"{path}.".startswith(
        ("t3.", "s3gen.flow.", "s3gen.tokenizer.", "s3gen.speaker_encoder.", "s3gen.mel2wav.", "ve.")
    )


def _weight(tensor: torch.Tensor | None) -> Any:
    """Identity, kind, layout, whether the storage holds nothing else, and a checksum of the content."""
    if tensor is None:
        return None
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return (id(tensor), kind_of(tensor), tuple(tensor.shape), tensor.stride(), alone, zlib.crc32(content))


def difference(before: Snapshot, after: Snapshot) -> list[str]:
    """Where two snapshots differ, as paths; empty where they are equal."""
    found: list[str] = []

    def walk(path: str, a: Any, b: Any) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            if list(a) != list(b):
                found.append(f"{path}: {sorted(set(a) ^ set(b)) or 'order'}")
            for key in a.keys() & b.keys():
                walk(f"{path}/{key}", a[key], b[key])
        elif a != b:
            found.append(path)

    walk("", before.state, after.state)
    return found


class Injected(Exception):
    """Raised on purpose by a test."""


@dataclass
class Faults:
    """Places at which an error can be injected while a model is optimized; see ``faults_around``."""

    target: int = 0
    passed: int = 0

    def arm(self, target: int) -> None:
        """Raise at the place of this number, counted from 1; 0 counts only."""
        self.target, self.passed = target, 0

    def reach(self) -> None:
        self.passed += 1
        if self.passed == self.target:
            raise Injected


def faults_around(monkeypatch: Any, name: str = "") -> Faults:
    """A place before and one after each write to the journal.

    With the ``name`` of a pass only the writes of its own ``apply`` count, and one place more follows it.
    """
    faults, inside = Faults(), not name

    def failing(verb):
        def write(self, *args, **options):
            if inside:
                faults.reach()
            verb(self, *args, **options)
            if inside:
                faults.reach()

        return write

    for verb in ("set", "record"):  # wrap calls set
        monkeypatch.setattr(Journal, verb, failing(getattr(Journal, verb)))
    for p in ALL_PASSES:
        if p.name == name:

            def apply(context, apply=p.apply):
                nonlocal inside
                inside = True
                try:
                    remark = apply(context)
                    faults.reach()
                finally:
                    inside = False
                return remark

            monkeypatch.setattr(p, "apply", apply)
    return faults
