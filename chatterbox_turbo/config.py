"""What a user may ask for: one frozen pydantic model, one section a pass, all cross-field rules.

Reading and writing files and environment variables is in ``config_io``; this module knows only values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema

from . import presets
from .errors import InvalidConfigError

Fidelity = Literal["exact", "numerical", "lossy"]
FIDELITIES: tuple[Fidelity, ...] = ("exact", "numerical", "lossy")  # strictest first

Enabled = bool | Literal["auto"]
Progress = Callable[[int, int], None]

# Where the values being validated come from, for messages: (source, overrides from the environment).
SOURCE: ContextVar[tuple[str, Mapping[str, Any]]] = ContextVar("SOURCE", default=("OptimizationConfig", {}))


class Section(BaseModel):
    """Options of one pass.

    ``enabled``: ``"auto"`` uses the pass where it can run and reports why where it cannot; ``true`` demands
    it, so that ``apply`` fails where it cannot run; ``false`` leaves upstream's behaviour.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    enabled: Enabled = "auto"

    @property
    def promise(self) -> Fidelity:
        """The fidelity class that these options allow the pass to promise."""
        return "exact"

    @property
    def idle(self) -> str:
        """Why these options ask for nothing, or an empty string where they ask for something."""
        return ""


class AlignmentSection(Section):
    """The multilingual alignment analyzer without the hooks and settings that it leaves behind."""


class DecodingSection(Section):
    """The token loop of T3."""

    max_new_tokens: int | None = Field(
        None, ge=1, le=4096, description="Speech tokens at most (25 a second); none: what the caller passes."
    )
    progress: Literal["bar", "off"] | SkipJsonSchema[Progress] = Field(
        "bar", description="'bar', 'off', or (in Python) a function of (tokens so far, tokens at most)."
    )
    backbone: Literal["auto", "upstream", "static"] = Field(
        "auto",
        description="What computes a step. upstream: the Transformers model, to the bit. static: this package's own "
        "step over fused weights and a static cache, within fp32 rounding. auto: static where the ceiling allows it.",
    )
    kernel: Literal["auto", "torch", "numba", "compile"] = Field(
        "auto", description="How the static backbone computes it. auto: whatever a short measurement finds fastest."
    )
    graphs: bool = Field(True, description="CUDA graphs around the static backbone's step, on CUDA.")
    huge_pages: bool = Field(
        True,
        description="The static backbone's weights in pages of 2 MB, on a CPU with Linux 6.1 or newer; takes up to "
        "some seconds when the model is prepared.",
    )

    @property
    def promise(self) -> Fidelity:
        return "numerical" if self.backbone == "static" else "exact"


class PrecisionSection(Section):
    """Number formats."""

    t3: Literal["float32", "auto", "bfloat16", "float16"] = Field(
        "float32",
        description="The weights of T3 while decoding. auto: the half-precision format that this device is good at.",
    )
    flow: Literal["float32", "auto", "bfloat16", "float16"] = Field(
        "float32", description="The weights of the flow estimator; auto as for t3. The rest of S3Gen stays float32."
    )
    tf32: bool = Field(False, description="TensorFloat-32 matrix products and convolutions while generating.")

    @property
    def promise(self) -> Fidelity:
        return "exact" if self.idle else "lossy"

    @property
    def idle(self) -> str:
        if self.tf32 or self.t3 != "float32" or self.flow != "float32":
            return ""
        return "precision.t3 and precision.flow are float32 and precision.tf32 is false"


class FlowSection(Section):
    """Flow matching: speech tokens to mel frames."""

    steps: int | None = Field(
        None,
        ge=1,
        le=100,
        description="Euler steps instead of upstream's 10 (Turbo: 2). Fewer are faster and rougher.",
    )
    guided_steps: int | None = Field(
        None, ge=0, le=100, description="Steps from the first on that are guided; the others take half the time."
    )
    prompt_seconds: float | None = Field(
        None, ge=1.0, le=10.0, description="Of the reference voice, the last seconds only; the shorter, the faster."
    )
    batch_frames: int | None = Field(
        None,
        ge=1,
        description="Frames of model.turbo.batch that are computed at once, 50 a second, the reference voice's and "
        "padding included; bounds the memory. By default 2000, on CUDA 32000.",
    )
    graphs: bool = Field(True, description="CUDA graphs around a step, on CUDA.")
    compile: bool = Field(False, description="torch.compile of a step, where there is a compiler.")

    @property
    def promise(self) -> Fidelity:
        knobs = (self.steps, self.guided_steps, self.prompt_seconds)
        return "numerical" if all(knob is None for knob in knobs) else "lossy"


class VocoderSection(Section):
    """Mel frames to samples."""

    graphs: bool = Field(True, description="CUDA graphs around the convolutions, on CUDA, where the ceiling allows it.")
    compile: bool = Field(False, description="torch.compile of the convolutions, where there is a compiler.")

    @property
    def promise(self) -> Fidelity:
        return "numerical" if self.compile else "exact"


class ConditioningSection(Section):
    """The encoding of reference voices."""

    cache_bytes: int = Field(
        64 * 2**20, ge=0, description="Bytes of encoded voices to keep, by the content of their audio (10 s: 0.2 MB)."
    )
    matmul: Literal["auto", "torch", "onednn"] = Field(
        "auto",
        description="What multiplies the speech tokenizer's fp32 matrices on a CPU. torch: as upstream, to the bit. "
        "onednn: within fp32 rounding. auto: the faster one by a short measurement, where the ceiling allows it.",
    )
    resampling: Literal["soxr", "torchaudio"] = Field(
        "soxr",
        description="soxr: the samples that librosa gives. torchaudio: on the model's device, another filter (33 dB).",
    )

    @property
    def promise(self) -> Fidelity:
        if self.resampling == "torchaudio":
            return "lossy"
        return "numerical" if self.matmul == "onednn" else "exact"


class WatermarkSection(Section):
    """The guard that lets no output leave ``generate`` without a PerTh watermark."""

    detect: bool = Field(False, description="Run PerTh's detector on every output and mark it again if it fails.")
    device: Literal["perth", "model"] = Field(
        "perth",
        description="What computes the watermark. perth: PerTh's network where it is (upstream: on the CPU), to the "
        "bit. model: a copy of it on the model's device, resampling included, within fp32 rounding.",
    )

    @property
    def promise(self) -> Fidelity:
        return "numerical" if self.device == "model" else "exact"


class WarmupSection(Section):
    """Work done at ``apply`` so that the first request does not pay for it."""

    level: Literal["off", "light", "full"] = Field(
        "off", description="light: a few tokens and their audio; full: a reference voice and a sentence as well."
    )

    @property
    def idle(self) -> str:
        return "warmup.level is off" if self.level == "off" else ""


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
            from .config_io import explain

            raise InvalidConfigError(explain(error, *SOURCE.get())) from None

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
    def from_file(cls, path: str | Path) -> OptimizationConfig:
        """Read TOML, YAML or JSON, by suffix; environment variables override the file (``config_io``)."""
        from .config_io import read

        return read(Path(path))

    def to_file(self, path: str | Path) -> Path:
        """Write TOML, YAML or JSON, by suffix. ``from_file`` gives an equal configuration back."""
        from .config_io import write

        return write(self, Path(path))


def exceeds(promise: Fidelity, ceiling: Fidelity) -> bool:
    """Whether ``promise`` is weaker than ``ceiling`` allows."""
    return FIDELITIES.index(promise) > FIDELITIES.index(ceiling)


def preset_values(name: Any) -> dict[str, Any]:
    """The values of a preset; a ``ValueError`` that names the nearest one where there is none."""
    if not isinstance(name, str) or name not in presets.PRESETS:
        from .config_io import nearest

        known = ", ".join(presets.PRESETS)
        raise ValueError(f"unknown preset {name!r}{nearest(str(name), presets.PRESETS)}; presets are: {known}")
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
