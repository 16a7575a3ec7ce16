"""Everything about a model that reverting must put back, and where two such snapshots differ."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from chatterbox_turbo.measure.fidelity import kind_of
from chatterbox_turbo.upstream.families import identify


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
