"""The options of each pass: one frozen section a pass, and what its options allow it to promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

Fidelity = Literal["exact", "numerical", "lossy"]
FIDELITIES: tuple[Fidelity, ...] = ("exact", "numerical", "lossy")  # strictest first

Enabled = bool | Literal["auto"]
Progress = Callable[[int, int], None]


def exceeds(promise: Fidelity, ceiling: Fidelity) -> bool:
    """Whether ``promise`` is weaker than ``ceiling`` allows."""
    return FIDELITIES.index(promise) > FIDELITIES.index(ceiling)


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
        "auto",
        description="How the static backbone computes it. auto: on CPUs whatever a short measurement finds fastest, on "
        "CUDA fused Triton kernels where they run, else torch.",
    )
    graphs: bool = Field(True, description="One CUDA graph a token around the static backbone's step, on CUDA.")
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
