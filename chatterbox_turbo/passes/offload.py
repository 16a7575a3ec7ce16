"""Parts that are not needed at the moment leave the device's memory: for the host's, or on a CPU for a mapped file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import describe
from ..runtime import forks
from ..runtime.cpu import cold
from ..runtime.device.offload import SPEAKING, VOICE, Place, Pressure, Residence
from ..runtime.device.overlay import DevicePart
from ..runtime.memory.free_memory import free_memory, is_out_of_memory
from ..upstream.families import Parts
from .base import Context, Pass

# What leaves with which phase: names of ``Parts.modules``.
PARTS = {
    VOICE: ("s3gen.tokenizer", "s3gen.speaker_encoder", "ve"),
    "t3": ("t3",),
    "flow": ("s3gen.flow",),
    "vocoder": ("s3gen.mel2wav",),
}
MADE_OF = {"decoding": "t3", "flow": "flow", "vocoder": "vocoder"}  # by pass: the part that its value is made of
# Where a phase begins: (owner, methods) on the model.
ENTRANCES = {
    VOICE: (
        ("s3gen", ("embed_ref",)),
        ("s3gen.tokenizer", ("forward",)),
        ("s3gen.speaker_encoder", ("forward", "inference")),
        ("ve", ("forward", "inference", "embeds_from_mels", "embeds_from_wavs")),
    ),
    "t3": (("t3", ("inference", "inference_turbo")),),
    "flow": (("s3gen", ("flow_inference",)), ("s3gen.flow", ("inference",))),
    "vocoder": (("s3gen", ("hift_inference",)), ("s3gen.mel2wav", ("inference",))),
}


class OffloadPass(Pass):
    """Moves weights at the boundaries of phases, where entry points and the engines of other passes are called.

    Hooks on modules would not do: those engines read weights and do not call the modules.
    """

    name = "offload"
    summary = "parts that a phase does not need leave the device's memory, and come back to the same addresses"

    def check(self, context: Context) -> str:
        device = context.parts.device
        if device.type == "cpu":
            return cold.why_not() or cold.spill_folder(context.config.offload.folder)[1]
        return "" if device.type == "cuda" else f"the memory of {device} is the host's, so that nothing is gained"

    def apply(self, context: Context) -> str:
        parts, section, journal = context.parts, context.config.offload, context.journal
        cuda = parts.device.type == "cuda"
        tensors = leaving(parts, keep_first=cuda)
        if (own := getattr(context.engines.vocoder, "tensors", None)) is not None:
            tensors["vocoder"] = own  # HiFT's have left for good
        places: dict[str, Place]
        if cuda:
            places = {name: DevicePart(some, parts.device) for name, some in tensors.items()}
        else:
            folder, _ = cold.spill_folder(section.folder)
            places = {name: cold.ColdPart(some, folder) for name, some in tensors.items()}
        pressure = None
        if section.mode == "adaptive":
            engine = context.engines.token_model

            def busy() -> bool:  # a stream's batch would lose its cache
                return engine is not None and len(engine.service) > 0

            pressure = Pressure(partial(free_memory, parts.device), section.free_below, section.free_again, busy)
        residence = Residence(
            places,
            section.mode == "sequential",
            context.transfers,
            pressure,
            section.prefetch,
            _moving(context, places) if cuda else lambda: lambda: None,
            _Switching(context, places),
        )
        journal.record("offloaded parts", residence.restore)
        if cuda:
            context.movable |= {id(tensor) for place in places.values() for tensor in place.tensors}
            if "conditioning" in context.prepared:  # voices are not made of addresses
                context.prepared["conditioning"].addresses = False
            # weights that were cast are given their old formats before all else, which is done where they are at home
            journal.record("offload of parts whose weights change", residence.come_home, residence.leave_again)
        residence.begin()
        for name, prepared in context.prepared.items():
            if name in MADE_OF:
                prepared.needed = partial(residence.enter, MADE_OF[name])
                if residence.sequential:
                    with residence.phase(MADE_OF[name]):
                        prepared.current()
        for phase, entrances in ENTRANCES.items():
            if phase in places:
                for path, names in entrances:
                    _guard(context, residence, phase, path, names)
        self._surround(context, residence)
        context.remarks[self.name] = lambda: _remark(section.mode, places, residence)
        return context.remarks[self.name]()

    def _surround(self, context: Context, residence: Residence) -> None:
        """Requests of all kinds: calls, batches, warm-ups, and voices that are prepared on their own."""
        context.settings.append(residence.call)
        model = context.parts.model
        for name in ("prepare_conditionals", "set_target_voice"):
            if callable(getattr(type(model), name, None)):
                inner = context.entry_points.get(name) or partial(getattr(type(model), name), model)
                context.entry_points[name] = _within(residence, inner)
        if context.config.offload.mode == "adaptive":
            retry = _Retry(residence, context.parts.device)
            context.settings.append(retry.remembering)
            context.retries.append(retry)


def _within(residence: Residence, inner: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with residence.call():
            return inner(*args, **kwargs)

    return run


def leaving(parts: Parts, keep_first: bool) -> dict[str, list[Tensor]]:
    """Parameters and buffers that leave, by the phase that needs them.

    ``keep_first``: but for the first of S3Gen, which tells upstream and this package the device of the model.
    """
    modules, found = parts.modules(), {}
    first = next(parts.s3gen.parameters())
    for phase, names in PARTS.items():
        # voice conversion hears by its tokenizer in every call
        own = [modules[n] for n in names if n in modules and not (parts.family == "vc" and n == "s3gen.tokenizer")]
        tensors = {id(t): t for module in own for t in (*module.parameters(), *module.buffers())}
        if keep_first:
            tensors.pop(id(first), None)
        if tensors:
            found[phase] = list(tensors.values())
    return found


def _guard(context: Context, residence: Residence, phase: str, path: str, names: tuple[str, ...]) -> None:
    """Begin a phase where one of the methods is called."""
    owner: Any = context.parts.model
    for name in path.split("."):
        owner = getattr(owner, name, None)
    engine = context.engines.token_model if phase == "t3" else None

    def enter(wrapped, instance, args, kwargs):
        if engine is not None and engine.calls.diverting:  # who diverts it has the answer, or wants the question alone
            return wrapped(*args, **kwargs)
        with residence.phase(phase):
            return wrapped(*args, **kwargs)

    for name in names:
        if isinstance(owner, nn.Module) and callable(getattr(owner, name, None)):
            context.journal.wrap(owner, name, enter)
    if engine is not None:
        request = engine.request

        def asked(*args: Any, **kwargs: Any) -> Any:
            with residence.phase(phase):
                return request(*args, **kwargs)

        context.journal.set(engine, "request", asked)


class _Switching:
    """What has been made of the speaking parts goes where they get other addresses: on CUDA, a shared region's."""

    def __init__(self, context: Context, places: dict[str, Place]):
        self._context, self._places, self._laid = context, places, False

    def __call__(self, sequential: bool) -> None:
        device = self._context.parts.device
        if device.type == "cpu" and self._laid:
            return  # the same pages, there or not
        self._laid = True
        for name, prepared in self._context.prepared.items():
            if name in MADE_OF:
                prepared.release()
        if device.type == "cuda":
            _overlay(self._places, device if sequential else None)


def _overlay(places: dict[str, Place], device: torch.device | None) -> None:
    """Give the speaking parts one region: T3 over flow and vocoder, which lie side by side for the prefetch.

    ``device``: none for memory of their own.
    """
    if device is None:
        for name in SPEAKING:
            if name in places:
                places[name].use(None)
        return
    spans = {name: places[name].span for name in SPEAKING if name in places}
    behind = spans.get("flow", 0)
    size = max(spans.get("t3", 0), behind + spans.get("vocoder", 0))
    with torch.inference_mode(False):  # or what lies in it would be inference tensors
        region = torch.empty(size, dtype=torch.uint8, device=device)
    for name in spans:
        start = behind if name == "vocoder" else 0
        # what lies beside the flow can come while that computes; over T3 nothing can
        places[name].use(region[start : start + spans[name]], early=name == "vocoder")


def _moving(context: Context, places: dict[str, Place]) -> Callable[[], Callable[[], None]]:
    """Tell what is made of weights that they are on their way, and come back."""

    def before() -> Callable[[], None]:
        every = [(p, MADE_OF[name]) for name, p in context.prepared.items() if name in MADE_OF]
        fitting = [(p, part) for p, part in every if part in places and p.fits()]

        def after() -> None:
            for prepared, part in fitting:
                prepared.away = any(t.device.type == "cpu" for t in places[part].tensors)

        return after

    return before


class _Retry:
    """One more try of a request that ran out of memory, in the next lower mode, with the same random numbers."""

    def __init__(self, residence: Residence, device: torch.device):
        self._residence, self._device, self._states = residence, device, []
        self._depth = 0

    @contextmanager
    def remembering(self) -> Iterator[None]:
        if not self._depth:
            cuda = self._device.type == "cuda"
            self._states = [torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if cuda else None]
        depth = self._depth
        with forks.undoing(partial(setattr, self, "_depth", depth)):
            self._depth = depth + 1
            yield

    def __call__(self, error: Exception) -> bool:
        if not is_out_of_memory(error) or not self._residence.lower(f"out of memory ({describe(error)})"):
            return False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        host, device = self._states
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, self._device)
        return True


def _remark(mode: str, places: dict[str, Place], residence: Residence) -> str:
    now = "sequential" if residence.sequential else "idle"
    leaving = [name for name in places if name == VOICE or residence.sequential]
    sizes = ", ".join(f"{name} {places[name].nbytes / 2**20:.0f} MiB" for name in leaving)
    text = f"{mode}, now {now}" if mode == "adaptive" else mode
    if residence.reason:
        text += f" ({residence.reason}; {residence.lowered} times)"
    return f"{text}: {sizes} away between uses; last request: {residence.last}"
