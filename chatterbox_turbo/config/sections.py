"""The options of each pass: one frozen section a pass, and what its options allow it to promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from .files import NOTHING

Fidelity = Literal["exact", "numerical", "lossy"]
FIDELITIES: tuple[Fidelity, ...] = ("exact", "numerical", "lossy")  # strictest first

FALSE = ("false", "off", "no", "0", "f", "n")  # as pydantic reads booleans
Enabled = bool | Literal["auto"]
Progress = Callable[[int, int], None]


def exceeds(promise: Fidelity, ceiling: Fidelity) -> bool:
    """Whether ``promise`` is weaker than ``ceiling`` allows."""
    return FIDELITIES.index(promise) > FIDELITIES.index(ceiling)


def without_words(model: type[BaseModel], field: str, value: Any) -> Any:
    """``None`` for a word of ``NOTHING``, where a field of a model may be that."""
    optional = type(None) in get_args(model.model_fields[field].annotation)
    return None if optional and isinstance(value, str) and value.lower() in NOTHING else value


class Section(BaseModel):
    """Options of one pass.

    ``enabled``: ``"auto"`` uses the pass where it can run and reports why where it cannot; ``true`` demands
    it, so that ``apply`` fails where it cannot run; ``false`` leaves upstream's behaviour.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    enabled: Enabled = "auto"

    @field_validator("*", mode="before")
    @classmethod
    def _read_words(cls, value: Any, info: ValidationInfo) -> Any:
        return without_words(cls, info.field_name, value)

    @property
    def promise(self) -> Fidelity:
        """The fidelity class that these options allow the pass to promise."""
        return "exact"

    @property
    def idle(self) -> str:
        """Why these options ask for nothing, or an empty string where they ask for something."""
        return ""


# What each profile keeps of memory that nobody uses, and when it gives it back.
MEMORY_PROFILES: dict[str, dict[str, Any]] = {
    "conservative": {"clear": "never", "keep_blocks": True, "expandable_segments": False},
    "balanced": {"clear": "pressure", "keep_blocks": True, "expandable_segments": True},
    "aggressive": {"clear": "between", "keep_blocks": False, "expandable_segments": True},
}


Pause = Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)]  # as text.options has it


class TextSection(Section):
    """Texts: where they are cut, and what is done about pieces that go wrong."""

    target: float = Field(12.0, ge=0.5, le=36.0, description="Seconds of speech that sentences are put together to.")
    longest: float = Field(18.0, ge=0.5, le=36.0, description="Seconds that no piece is estimated to exceed.")
    pauses: dict[Literal["word", "comma", "clause", "sentence", "paragraph", "chapter"], Pause] = Field(
        {}, description="Seconds of silence behind a piece, by what it ends at; the others as in docs/long_text.md."
    )
    normalize: bool = Field(False, description="Numbers, dates and abbreviations as words, in every text.")
    retries: int = Field(
        2, ge=0, le=10, description="How often a piece that went wrong (repetition, silence, no end) is said again."
    )
    loudness: bool = Field(True, description="Pieces as loud as those before them, by 3 dB at most.")

    @model_validator(mode="after")
    def _check_lengths(self) -> TextSection:
        if {"target", "longest"} <= self.model_fields_set and self.target > self.longest:
            raise ValueError(f"target is {self.target:g} and longest is {self.longest:g}, which is no less than target")
        return self

    @property
    def lengths(self) -> tuple[float, float]:
        """Target and longest; the one that is not set gives way to the one that is."""
        if "longest" in self.model_fields_set:
            return min(self.target, self.longest), self.longest
        return self.target, max(self.target, self.longest)

    @property
    def promise(self) -> Fidelity:
        return "lossy" if self.normalize else "exact"  # texts that upstream says whole stay as they are


class MemorySection(Section):
    """Memory that allocators keep: when it is given back, how it is laid out, what is measured of it."""

    profile: Literal["conservative", "balanced", "aggressive"] = Field(
        "conservative",
        description="conservative: keep for the next request what was freed. balanced: give it back when memory is "
        "short. aggressive: give it back after each request. The table is in docs/memory.md.",
    )
    clear: Literal["never", "pressure", "between"] | None = Field(
        None, description="When freed memory is given back after requests; none: what the profile says."
    )
    free_below: float = Field(
        0.1, gt=0, lt=1, description="Pressure: the share of the device's memory that is free is below this."
    )
    keep_blocks: bool | None = Field(
        None,
        description="On a CPU with glibc, let freed blocks of up to 32 MB stay with the process; none: what the "
        "profile says.",
    )
    expandable_segments: bool | None = Field(
        None, description="On CUDA, segments of PyTorch's allocator that grow; none: what the profile says."
    )
    max_split_mb: int | None = Field(
        None, gt=20, description="On CUDA, larger blocks of PyTorch's allocator are not split; none: all are."
    )
    peaks: bool = Field(
        False,
        description="Exact peaks by phase. The process's counters of the highest use begin anew for each phase.",
    )

    def chosen(self, name: str) -> Any:
        """An option as it was set, or else as the profile has it."""
        value = getattr(self, name)
        return MEMORY_PROFILES[self.profile][name] if value is None else value


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
    streams: int = Field(
        4,
        ge=1,
        le=256,
        description="Streams whose tokens are decoded in one batch, with a budget budget_slots at most; more wait. On "
        "a GPU their keys and values have a place each (0.3 GB in half precision for 40 s of speech), on a CPU as they "
        "are written.",
    )
    voice_bytes: int = Field(
        128 * 2**20,
        ge=0,
        description="Of keys and values that the voices used last leave, on a CPU; 0: none. Turbo's and Nano's voices "
        "take 376 positions (Turbo: 39 MB in half precision), which the next request with the voice then skips.",
    )

    @property
    def promise(self) -> Fidelity:
        return "numerical" if self.backbone == "static" else "exact"


Attending = Literal["auto", "sdpa", "flash_attention_2", "eager"]


class AttentionSection(Section):
    """What computes attention."""

    prefill: Attending = Field(
        "auto",
        description="The prefill of T3. auto: what is fastest here. sdpa: a kernel of torch's. flash_attention_2: "
        "flash-attn, on CUDA from capability 8.0 in half precision. eager: two products and a softmax.",
    )
    flow: Attending = Field("auto", description="The flow estimator, likewise.")
    encoder: Attending = Field(
        "auto", description="The encoder of speech tokens, likewise; flash_attention_2 cannot add relative positions."
    )
    kernel: Literal["auto", "flash", "efficient", "math", "cudnn"] = Field(
        "auto", description="Which of torch's kernels where a part asks for sdpa. auto: torch's own choice."
    )

    @property
    def parts(self) -> dict[str, str]:
        """What is asked for, by part, where it is not ``auto``."""
        each = {"prefill": self.prefill, "flow": self.flow, "encoder": self.encoder}
        return {part: name for part, name in each.items() if name != "auto"}

    @property
    def promise(self) -> Fidelity:
        if "flash_attention_2" in self.parts.values():
            return "lossy"  # it computes in half precision only
        return "numerical" if self.parts else "exact"

    @property
    def idle(self) -> str:
        return "" if self.parts else "attention.prefill, flow and encoder are auto"


PRECISION_PARTS = ("t3", "flow", "encoder", "vocoder")
Format = Literal["float32", "auto", "bfloat16", "float16"]


class PrecisionSection(Section):
    """Number formats."""

    t3: Format = Field(
        "float32",
        description="The weights of T3 while decoding. auto: the half-precision format that this device is good at.",
    )
    flow: Format = Field("float32", description="The weights of the flow estimator; auto as for t3.")
    encoder: Format = Field("float32", description="The weights of the encoder of speech tokens; auto as for t3.")
    vocoder: Format = Field(
        "float32",
        description="What HiFT's residual blocks multiply; auto as for t3. The rest of it stays float32, and so does "
        "Vocos. The weights are copied: upstream's own stay as they are.",
    )
    originals: Literal["host", "discard"] = Field(
        "host",
        description="What reverting restores the cast weights from. host: what they lost is kept in the host's memory, "
        "so that they come back to the bit. discard: nothing is kept; they come back rounded.",
    )
    autocast: Literal[False, "bfloat16", "float16"] = Field(
        False,
        description="torch.autocast around T3's steps and the flow estimator's: fp32 weights are cast at every use, "
        "which saves no memory and takes time. For comparisons; no preset has it.",
    )
    tf32: bool = Field(False, description="TensorFloat-32 matrix products and convolutions while generating.")

    @property
    def promise(self) -> Fidelity:
        return "exact" if self.idle else "lossy"

    @field_validator("autocast", mode="before")
    @classmethod
    def _read_false(cls, value: Any) -> Any:
        """The environment has words only, and no boolean is among what this may be otherwise."""
        return False if isinstance(value, str) and value.lower() in FALSE else value

    @property
    def idle(self) -> str:
        if self.tf32 or self.autocast or self.halved:
            return ""
        return f"{self.plain}, precision.tf32 and precision.autocast are false"

    @property
    def halved(self) -> tuple[str, ...]:
        """The parts that half precision is asked for."""
        return tuple(part for part in PRECISION_PARTS if getattr(self, part) != "float32")

    @property
    def plain(self) -> str:
        """That no part is."""
        return " and ".join(f"precision.{part}" for part in PRECISION_PARTS) + " are float32"


class QuantizationSection(Section):
    """Weights of T3 as small integers."""

    t3: Literal["none", "auto", "int8", "int4", "nf4", "fp4"] = Field(
        "none",
        description="The scheme of T3's matrices. int8: 8.1 bits a weight, int4, nf4, fp4: 4.5. "
        "auto: four bits, int4 on a CPU, nf4 on a GPU.",
    )
    strategy: Literal["conservative", "balanced", "aggressive"] = Field(
        "balanced",
        description="Which matrices stay as they are, embeddings, heads and norms always. conservative: two blocks at "
        "either end, and of each block what leaves its MLP. balanced: a block at either end. aggressive: no others.",
    )
    backend: Literal["auto", "native", "bitsandbytes", "torch"] = Field(
        "auto",
        description="What multiplies. native: this package's kernels for CPUs. bitsandbytes: its kernels for nf4 and "
        "fp4, slow on a CPU. torch: the matrix is made anew for each product. auto: what is fast on this device; on a "
        "CPU other schemes are left out.",
    )
    originals: Literal["host", "discard"] = Field(
        "host",
        description="host: the layers that are replaced are kept in the host's memory, and reverting puts them back. "
        "discard: they are let go once everything is applied, and T3 stays quantized when that is reverted.",
    )
    rounding: Literal["nearest", "fitted"] = Field(
        "fitted",
        description="Of int4. nearest: from the least to the largest weight of a group. fitted: scale and zero by "
        "least squares, in turns with the codes.",
    )

    @property
    def promise(self) -> Fidelity:
        return "exact" if self.idle else "lossy"

    @property
    def idle(self) -> str:
        return "quantization.t3 is none" if self.t3 == "none" else ""


class FlowSection(Section):
    """Flow matching: speech tokens to mel frames."""

    steps: int | None = Field(
        None,
        ge=1,
        le=100,
        description="Euler steps instead of upstream's 10; fewer are faster and rougher. Turbo takes its 2 at most.",
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

    kind: Literal["hift", "vocos"] = Field(
        "hift",
        description="hift: upstream's vocoder. vocos: another network, with less to compute, of a checkpoint that was "
        "trained on the model's mel frames (docs/vocoder.md).",
    )
    checkpoint: str | None = Field(
        None, description="Of vocos: a folder with vocoder.json and vocoder.safetensors, or a repository of the hub."
    )
    graphs: bool = Field(True, description="CUDA graphs around the convolutions, on CUDA, where the ceiling allows it.")
    compile: bool = Field(False, description="torch.compile of the convolutions, where there is a compiler.")
    upsampling: Literal["auto", "whole", "pieces"] = Field(
        "auto",
        description="HiFT's transposed convolutions on a CPU. whole: as upstream, to the bit; oneDNN compiles them for "
        "each new length, for up to a second. pieces: of one length, or with channels last by matrix products, within "
        "fp32 rounding. auto: in pieces where the ceiling allows it.",
    )
    layout: Literal["auto", "channels_first", "channels_last"] = Field(
        "auto",
        description="How HiFT's activations lie in a CPU's memory. channels_first: as upstream, to the bit. "
        "channels_last: as oneDNN's convolutions want them, within fp32 rounding, in 0.7 to 0.9 of the time. auto: "
        "channels_last where the ceiling allows it, on x86 with AVX2.",
    )

    @property
    def promise(self) -> Fidelity:
        if self.kind == "vocos":
            return "lossy"
        rounds = self.compile or self.upsampling == "pieces" or self.layout == "channels_last"
        return "numerical" if rounds else "exact"


class ConditioningSection(Section):
    """The encoding of reference voices."""

    cache_bytes: int = Field(
        64 * 2**20, ge=0, description="Bytes of encoded voices to keep, by the content of their audio (10 s: 0.2 MB)."
    )
    voices_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="Bytes of named voices at most, on the host (0.2 MB each); more are refused, none is dropped.",
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


class OffloadSection(Section):
    """Parts of the model that are not needed at the moment: away from the device's memory."""

    mode: Literal["off", "idle", "sequential", "adaptive"] = Field(
        "off",
        description="idle: what encodes a reference voice is there only while one is encoded. sequential: T3, flow and "
        "vocoder as well, each in its phase only. adaptive: idle until memory is short, then sequential, and back.",
    )
    free_below: float = Field(
        0.1, gt=0, lt=1, description="adaptive: the share of memory that is free is below this: sequential begins."
    )
    free_again: float = Field(
        0.2, gt=0, lt=1, description="adaptive: it is above this even with all parts back: sequential ends."
    )
    prefetch: bool = Field(True, description="sequential: the next phase's part is on its way while a phase computes.")
    folder: str | None = Field(
        None,
        description="On a CPU, a folder on a disk for weights that no mapped checkpoint holds (files without a name, "
        "gone with the process); none: that of temporary files, or /var/tmp.",
    )

    @property
    def idle(self) -> str:
        return "offload.mode is off" if self.mode == "off" else ""


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
        "off",
        description="light: a few tokens and their audio; full: also a reference voice, and what streams begin with.",
    )

    @property
    def idle(self) -> str:
        return "warmup.level is off" if self.level == "off" else ""
