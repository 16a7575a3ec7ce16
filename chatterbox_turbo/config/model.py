"""The declaration of every step that ``apply`` takes: one frozen pydantic model, and all rules between its sections."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ..errors import InvalidConfigError, brief
from . import files, presets
from .messages import explain, nearest
from .sections import (
    AlignmentSection,
    ConditioningSection,
    DecodingSection,
    Fidelity,
    FlowSection,
    PrecisionSection,
    Section,
    VocoderSection,
    WarmupSection,
    WatermarkSection,
    exceeds,
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
    decoding: DecodingSection = DecodingSection()
    alignment: AlignmentSection = AlignmentSection()
    precision: PrecisionSection = PrecisionSection()
    flow: FlowSection = FlowSection()
    vocoder: VocoderSection = VocoderSection()
    conditioning: ConditioningSection = ConditioningSection()
    watermark: WatermarkSection = WatermarkSection()
    warmup: WarmupSection = WarmupSection()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidConfigError(explain(type(self), error, *_SOURCE.get())) from None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("preset") is None:
            return values
        return merge(preset_values(values["preset"]), values)

    @model_validator(mode="after")
    def _check_contradictions(self) -> OptimizationConfig:
        if self.halves_t3 and (self.decoding.enabled is False or self.decoding.backbone == "upstream"):
            raise ValueError(
                f'precision.t3 is "{self.precision.t3}" but decoding.'
                + ("enabled is false" if self.decoding.enabled is False else 'backbone is "upstream"')
                + ": only the static backbone reads weights in half precision"
            )
        if self.halves_flow and self.flow.enabled is False:
            raise ValueError(
                f'precision.flow is "{self.precision.flow}" but flow.enabled is false: only the solver of this package '
                "keeps token ids and state out of half precision"
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

    @property
    def halves_t3(self) -> bool:
        """Whether the weights of T3 are asked for in half precision."""
        return self.precision.t3 != "float32" and self.precision.enabled is not False

    @property
    def halves_flow(self) -> bool:
        """Whether the weights of the flow estimator are asked for in half precision."""
        return self.precision.flow != "float32" and self.precision.enabled is not False

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

        Every key is written, so that the file keeps its meaning when a preset changes.
        """
        if callable(self.decoding.progress):
            raise InvalidConfigError(
                f"Cannot write {path}: decoding.progress is a function.", "", "Set it to 'bar' or 'off' first."
            )
        return files.write(self.model_dump(exclude_none=True), Path(path))


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
