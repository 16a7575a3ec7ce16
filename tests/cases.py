"""The table of passes that every generic test runs over, and what the tests need to look at a model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from chatterbox_turbo import synthetic
from chatterbox_turbo.fidelity import arguments
from chatterbox_turbo.upstream.families import identify

FAMILIES = ("english", "multilingual", "turbo", "vc")
SPEAKING = FAMILIES[:3]
SECTIONS = ("decoding", "alignment", "precision", "watermark", "warmup")
QUIET = {"progress": "off"}


@dataclass(frozen=True)
class Case:
    """One pass alone, the families it applies to, its promise, and what shows that it did something.

    ``observe(model, turn_on, speak)`` calls ``turn_on`` and ``speak`` and returns something that must be
    different with the pass than without.
    """

    name: str
    options: dict[str, Any]
    families: tuple[str, ...]
    promise: str
    observe: Callable[[Any, Callable[[], None], Callable[[], torch.Tensor]], Any]

    @property
    def config(self) -> dict[str, Any]:
        return only(self)

    def __str__(self) -> str:
        return self.name


def only(*cases: Case) -> dict[str, Any]:
    """A configuration with exactly these passes demanded and every other one off."""
    sections: dict[str, Any] = {name: {"enabled": False} for name in SECTIONS}
    for case in cases:
        sections[case.name] = {"enabled": True, **case.options}
    return sections


def _state_dict_and_bar(model, turn_on, speak):
    """Whether T3 keeps its state-dict keys (upstream's Llama loop does not) and a progress bar is drawn."""
    model.t3._modules.pop("patched_model", None)
    turn_on()
    keys = list(model.t3.state_dict())
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        speak()
    return list(model.t3.state_dict()) == keys, "/1000" in shown.getvalue()


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


def _work_before_the_first_call(model, turn_on, speak):
    runs = []
    handle = model.s3gen.flow.encoder.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        turn_on()
    finally:
        handle.remove()
    return len(runs)


CASES = (
    Case("decoding", QUIET, SPEAKING, "exact", _state_dict_and_bar),
    Case("alignment", {}, ("multilingual",), "exact", _new_hooks),
    Case("watermark", {}, FAMILIES, "exact", _survives_a_swap),
    Case("warmup", {"level": "full"}, FAMILIES, "exact", _work_before_the_first_call),
)
ROWS = [(case, family) for case in CASES for family in case.families]
TEXT = "The quick brown fox."


def request_for(model: Any, text: str = TEXT) -> dict[str, Any]:
    """Arguments of ``generate`` for any family."""
    return arguments(identify(model), text, audio=str(synthetic.reference_voice()))


def speak(model: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    """Samples (1, m) of one seeded generation."""
    torch.manual_seed(seed)
    return model.generate(**{**request_for(model), **options})


def count_hooks(module: nn.Module) -> int:
    """Forward hooks of all kinds in a tree of modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@dataclass
class Snapshot:
    """Everything that ``revert`` must put back, compared with ``==``; ``kept`` keeps ids from being reused."""

    state: dict[str, Any]
    kept: list[Any] = field(default_factory=list, compare=False, repr=False)


def snapshot(model: Any) -> Snapshot:
    """Instance attributes of the model and of every object that holds a part, module by module.

    The voice is looked at by its identity and content keys, hooks by identity and order, parameters by storage.
    """
    kept: list[Any] = []

    def entries(table: dict) -> dict[str, Any]:
        kept.extend(table.values())
        return {str(key): entry(value) for key, value in table.items()}

    def entry(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (id(value), value.data_ptr(), value.dtype, str(value.device))
        return entries(value) if isinstance(value, dict) else id(value)

    roots = {name: getattr(model, name, None) for name in ("t3", "s3gen", "ve")}
    state = {"model": entries(vars(model)), "class": entries(dict(vars(type(model))))}
    for root, module in roots.items():
        if module is None:
            continue
        state[f"{root}.state_dict"] = {k: v.data_ptr() for k, v in module.state_dict().items()}
        for path, part in module.named_modules():
            state[f"{root}.{path}"] = entries(vars(part))
            state[f"{root}.{path} class"] = entries(dict(vars(type(part))))
            if hasattr(part, "config"):
                state[f"{root}.{path} config"] = {k: repr(v) for k, v in vars(part.config).items()}
    for owner in ("tokenizer", "watermarker"):
        if hasattr(getattr(model, owner, None), "__dict__"):
            state[owner] = entries(vars(getattr(model, owner)))
    return Snapshot(state, kept)


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
