"""The declaration of every step that ``apply`` takes: one frozen pydantic model, and all rules between its sections."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ..errors import InvalidConfigError, brief
from . import amounts, files, presets
from .messages import explain, nearest
from .sections import (
    AlignmentSection,
    AttentionSection,
    ConditioningSection,
    DecodingSection,
    Fidelity,
    FlowSection,
    MemorySection,
    OffloadSection,
    PrecisionSection,
    QuantizationSection,
    Section,
    TextSection,
    VocoderSection,
    WarmupSection,
    WatermarkSection,
    exceeds,
    without_words,
)

# Where the values being validated come from, for messages: (source, overrides from the environment).
_SOURCE: ContextVar[tuple[str, Mapping[str, Any]]] = ContextVar("_SOURCE", default=("OptimizationConfig", {}))


class OptimizationConfig(BaseModel):
    """The declaration of every step that ``apply`` takes.

    ``preset`` gives the values of keys that are not set here; ``fidelity`` is the ceiling: a pass whose
    promise is weaker is skipped where it is ``auto`` and refused where it is demanded.

    Raises:
        InvalidConfigError: unknown key (with the nearest right one), wrong type or value, contradiction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str | None = None
    fidelity: Fidelity = "numerical"
    vram_budget: str | int | None = Field(
        None,
        description="What a model on a GPU may take of its memory while it works: an amount or a share of the card. "
        "Options that are not set here are chosen so that it fits.",
    )
    memory_budget: str | int | None = Field(
        None, description="Likewise of a model on a CPU, beside what the process has anyway."
    )
    budget_slots: int = Field(1, ge=1, description="Utterances at once (batches, streams) that the budget holds for.")
    text: TextSection = TextSection()
    memory: MemorySection = MemorySection()
    decoding: DecodingSection = DecodingSection()
    alignment: AlignmentSection = AlignmentSection()
    quantization: QuantizationSection = QuantizationSection()
    precision: PrecisionSection = PrecisionSection()
    attention: AttentionSection = AttentionSection()
    flow: FlowSection = FlowSection()
    vocoder: VocoderSection = VocoderSection()
    conditioning: ConditioningSection = ConditioningSection()
    watermark: WatermarkSection = WatermarkSection()
    offload: OffloadSection = OffloadSection()
    warmup: WarmupSection = WarmupSection()

    def __init__(self, /, **values: Any) -> None:  # a key of a file may be called self
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidConfigError(explain(type(self), error, *_SOURCE.get())) from None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or without_words(cls, "preset", values.get("preset")) is None:
            return values
        return merge(preset_values(values["preset"]), values)

    @field_validator("vram_budget", "memory_budget", mode="before")
    @classmethod
    def _check_amount(cls, value: Any) -> Any:
        if value is not None:
            amounts.parse(value)
        return value

    @field_validator("*", mode="before")  # the last one is the first that is called
    @classmethod
    def _read_words(cls, value: Any, info: ValidationInfo) -> Any:
        return without_words(cls, info.field_name, value)

    @model_validator(mode="after")
    def _check_contradictions(self) -> OptimizationConfig:
        halved = self.halved
        if "t3" in halved and (self.decoding.enabled is False or self.decoding.backbone == "upstream"):
            raise ValueError(
                f'precision.t3 is "{self.precision.t3}" but decoding.'
                + ("enabled is false" if self.decoding.enabled is False else 'backbone is "upstream"')
                + ": only the static backbone reads weights in half precision"
            )
        for part in ("flow", "encoder"):
            if part in halved and self.flow.enabled is False:
                raise ValueError(
                    f'precision.{part} is "{getattr(self.precision, part)}" but flow.enabled is false: only the solver '
                    "of this package keeps token ids and state out of half precision"
                )
        if self.precision.originals == "discard" and not set(halved) - {"vocoder"}:  # of which there is a copy
            raise ValueError(
                'precision.originals is "discard" but precision.t3, precision.flow and precision.encoder are float32: '
                "nothing is cast, so there is nothing to discard"
                if self.precision.enabled is not False
                else 'precision.originals is "discard" but precision.enabled is false: drop one of the two'
            )
        if self.precision.autocast and self.precision.enabled is not False:
            self._check_autocast()
        if self.attention.kernel != "auto" and "sdpa" not in self.attention.parts.values():
            raise ValueError(
                f'attention.kernel is "{self.attention.kernel}" but none of attention.prefill, attention.flow and '
                'attention.encoder is "sdpa", which it belongs to'
            )
        self._check_vocoder()
        if self.vram_budget is not None and self.memory_budget is not None:
            raise ValueError("vram_budget and memory_budget are both set: the first is for a GPU, the second for a CPU")
        if self.budget_slots > 1 and self.budget is None:
            raise ValueError(f"budget_slots is {self.budget_slots}, but neither vram_budget nor memory_budget is set")
        if self.offload.free_again <= self.offload.free_below:
            raise ValueError(
                f"offload.free_again is {self.offload.free_again} and offload.free_below is "
                f"{self.offload.free_below}: the first must be larger, or the mode would change with every request"
            )
        for name, section in self.sections():
            if section.enabled is True and section.idle:
                raise ValueError(f"{name}.enabled is true but {section.idle}: there is nothing to enable")
            if section.enabled is False and not section.idle and type(section)().idle:
                asked = ", ".join(f"{name}.{key}" for key in sorted(section.model_fields_set - {"enabled"}))
                raise ValueError(f"{name}.enabled is false but {asked} asks for it: drop one of the two")
            asked_for = section.enabled is True or section.promise != type(section)().promise
            if section.enabled is not False and asked_for and exceeds(section.promise, self.fidelity):
                raise ValueError(
                    f'{name} is {section.promise}, above the ceiling fidelity = "{self.fidelity}": '
                    f'set fidelity = "{section.promise}" to allow it, or take it out of {name}'
                )
        return self

    def _check_vocoder(self) -> None:
        kind, checkpoint, enabled = self.vocoder.kind, self.vocoder.checkpoint, self.vocoder.enabled
        if kind == "vocos" and not checkpoint:
            raise ValueError(
                'vocoder.kind is "vocos" but vocoder.checkpoint is not set: name a folder or a repository of the hub '
                "with a vocoder that was trained on this model's mel frames (docs/vocoder.md)"
            )
        if kind != "vocos" and checkpoint is not None:
            raise ValueError(
                f'vocoder.checkpoint is {brief(checkpoint)} but vocoder.kind is "{kind}", whose weights are the '
                'model\'s own: set vocoder.kind = "vocos", or drop vocoder.checkpoint'
            )
        if kind == "vocos" and enabled is False:
            raise ValueError('vocoder.enabled is false but vocoder.kind is "vocos": drop one of the two')

    def _check_autocast(self) -> None:
        autocast = f'precision.autocast is "{self.precision.autocast}"'
        for part in ("t3", "flow"):
            wanted = getattr(self.precision, part)
            if wanted != "float32":
                raise ValueError(
                    f'{autocast} but precision.{part} is "{wanted}": weights are cast once or at every use, not both; '
                    f'set precision.{part} = "float32", or drop autocast'
                )
        if self.decoding.enabled is False and self.flow.enabled is False:
            raise ValueError(f"{autocast} but decoding.enabled and flow.enabled are false: they would use it")
        if self.decoding.enabled is not False and self.decoding.kernel in ("numba", "compile"):
            raise ValueError(
                f'{autocast} but decoding.kernel is "{self.decoding.kernel}": only torch\'s own operations are autocast'
                '; set decoding.kernel = "torch", or drop autocast'
            )
        if self.flow.enabled is not False and self.flow.compile:
            raise ValueError(f"{autocast} but flow.compile is true: only torch's own operations are autocast")

    @property
    def budget(self) -> str | int | None:
        """The budget of either kind, as it was written."""
        return self.memory_budget if self.vram_budget is None else self.vram_budget

    @property
    def streams(self) -> int:
        """Streams whose tokens are decoded at once: with a budget no more than it holds for."""
        return self.decoding.streams if self.budget is None else min(self.decoding.streams, self.budget_slots)

    @property
    def halved(self) -> tuple[str, ...]:
        """The parts whose weights are asked for in half precision."""
        return () if self.precision.enabled is False else self.precision.halved

    def sections(self) -> list[tuple[str, Section]]:
        """The sections by name, in the order of the fields."""
        pairs = ((name, getattr(self, name)) for name in type(self).model_fields)
        return [(name, value) for name, value in pairs if isinstance(value, Section)]

    @classmethod
    def from_preset(cls, name: str) -> OptimizationConfig:
        """The configuration of a preset (``presets.PRESETS``)."""
        return cls(preset=name)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], source: str, environment: bool = False) -> OptimizationConfig:
        """Check nested values; errors say that they come from ``source``.

        ``environment``: its variables (``files.environment``) override them.
        """
        overrides = files.environment() if environment else {}
        token = _SOURCE.set((source, overrides))
        try:
            return cls(**{str(key): value for key, value in merge(values, overrides).items()})
        finally:
            _SOURCE.reset(token)

    @classmethod
    def from_file(cls, path: str | Path) -> OptimizationConfig:
        """Read TOML, YAML or JSON, by suffix; environment variables override the file (``config.files``)."""
        return cls.from_values(files.read(Path(path)), str(path), environment=True)

    def to_file(self, path: str | Path) -> Path:
        """Write TOML, YAML or JSON, by suffix. ``from_file`` gives an equal configuration back.

        What is set is written, by the preset too, so that the file keeps its meaning when a preset changes. Defaults
        are not: a budget chooses among keys that nobody has set.
        """
        if callable(self.decoding.progress):
            raise InvalidConfigError(
                f"Cannot write {path}: decoding.progress is a function.", "", "Set it to 'bar' or 'off' first."
            )
        return files.write(self.model_dump(exclude_unset=True), Path(path))


def preset_values(name: Any) -> dict[str, Any]:
    """The values of a preset; a ``ValueError`` that names the nearest one where there is none."""
    if not isinstance(name, str) or name not in presets.PRESETS:
        known = ", ".join(presets.PRESETS)
        raise ValueError(f"unknown preset {brief(name)}{nearest(str(name), presets.PRESETS)}; presets are: {known}")
    return presets.PRESETS[name]


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` overridden by ``above``, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Section):
            value = value.model_dump(exclude_unset=True)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
