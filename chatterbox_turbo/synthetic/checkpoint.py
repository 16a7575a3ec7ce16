"""Synthetic models and checkpoint folders, built by upstream's own `from_local`."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architecture import PROMPT_TOKENS, SHALLOW, architecture, replaced
from .planting import plant_s3gen, plant_t3
from .recording import reference_voice
from .vocabulary import write_gpt2_tokenizer, write_grapheme_tokenizer

DEFAULT_STOP = {"tiny": 24, "full": 150, SHALLOW: 8}
_MAX_STOP = 990  # upstream's generate ends at 1000 speech tokens


@dataclass(frozen=True)
class _Family:
    """Where upstream keeps a family, and the files its `from_local` reads (later names: older releases)."""

    module: str
    name: str
    s3gen: str
    t3: tuple[str, ...] = ()
    ve: str | None = None
    tokenizer: tuple[str, ...] = ()
    load_options: tuple[tuple[str, Any], ...] = ()


_FAMILIES = {
    "english": _Family(
        "chatterbox.tts", "ChatterboxTTS", "s3gen.safetensors", ("t3_cfg.safetensors",), "ve.safetensors",
        ("tokenizer.json",),
    ),
    "multilingual": _Family(
        "chatterbox.mtl_tts", "ChatterboxMultilingualTTS", "s3gen.pt",
        ("t3_mtl23ls_v2.safetensors", "t3_23lang.safetensors"), "ve.pt",
        ("grapheme_mtl_merged_expanded_v1.json", "mtl_tokenizer.json"),
    ),
    "turbo": _Family(
        "chatterbox.tts_turbo", "ChatterboxTurboTTS", "s3gen_meanflow.safetensors", ("t3_turbo_v1.safetensors",),
        "ve.safetensors",
    ),
    "nano": _Family(
        "chatterbox.tts_turbo", "ChatterboxTurboTTS", "s3gen_meanflow.safetensors", ("t3_nano_v1.safetensors",),
        "ve.safetensors", load_options=(("nano", True),),
    ),
    "vc": _Family("chatterbox.vc", "ChatterboxVC", "s3gen.safetensors"),
}  # fmt: skip

FAMILIES = tuple(_FAMILIES)


def build(family: str, size: str = "tiny", stop_after: int | None = None, seed: int = 0, device: str = "cpu") -> Any:
    """Build an upstream model with random weights and a built-in voice.

    Args:
        family: one of `FAMILIES`.
        size: "tiny" (every part of the real structure, few layers and channels; speech in well under a second) or
            "full" (the real architecture: 2.1 to 3.2 GB of fp32 weights), or `SHALLOW`.
        stop_after: speech tokens (40 ms each) before the planted stop token, 2 to 990; 24 for "tiny" and 150 for
            "full" where None. Exact for every text; upstream's multilingual alignment analyzer may add two. Not for
            "vc", whose output is as long as its input.
        seed: of the weights; the same four arguments give the same weights and voice, on every device.
        device: where the model ends up. Its weights are drawn on the CPU.

    Returns:
        The `chatterbox` object as its `from_local` makes it, in eval mode. `conds` (`ref_dict` for "vc") holds the
        reference voice as upstream's own `prepare_conditionals` encodes it, of which "tiny" takes the first second.

    The caller's random generators are left as they were.
    """
    import torch

    from ..upstream.rebinding import once

    chosen = _check(family, size, stop_after)
    cls = _upstream_class(family)
    stop = DEFAULT_STOP[size] if stop_after is None else stop_after
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), ExitStack() as stack:
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would reseed accelerators as well
        _write_tokenizer(Path(folder), family, cls)
        for name in (chosen.s3gen, chosen.ve, *chosen.t3):
            if name:
                _write_weights(Path(folder) / name, {})
        stack.enter_context(architecture(size))
        stack.enter_context(_initialised_instead_of_loaded(stop))
        stack.enter_context(once(cls, "build"))  # a launcher's wrappers stay out of it
        model = cls.from_local(folder, "cpu", **dict(chosen.load_options))
        with torch.no_grad():
            _encode_reference_voice(model, size)
    return model if device == "cpu" else _move(model, device)


def save(directory: str | Path, family: str, size: str = "tiny", stop_after: int | None = None, seed: int = 0) -> Path:
    """Write `build(family, size, stop_after, seed)` as a checkpoint folder that upstream's `from_local` loads.

    A "tiny" folder needs `with architecture("tiny"):` around `from_local`, and "nano" needs its `nano=True`. Returns
    the folder, made if it does not exist; files of the same names are overwritten.
    """
    import torch

    model = build(family, size, stop_after, seed)
    chosen, cls, folder = _FAMILIES[family], type(model), Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, family, cls)
    _write_weights(folder / chosen.s3gen, model.s3gen.state_dict())
    if family == "vc":
        torch.save({"gen": model.ref_dict}, folder / "conds.pt")
        return folder
    weights = model.t3.state_dict()
    if hasattr(model.t3.tfmr, "wpe"):  # from_local wants GPT-2's token embedding in the file, then deletes it
        weights["tfmr.wte.weight"] = torch.zeros(model.t3.cfg.vocab_size, model.t3.dim)
    _write_weights(folder / _name_read_by(cls, chosen.t3), weights)
    _write_weights(folder / chosen.ve, model.ve.state_dict())
    model.conds.save(folder / "conds.pt")
    return folder


def _check(family: str, size: str, stop_after: int | None) -> _Family:
    if family not in _FAMILIES:
        raise ValueError(f"Unknown family {family!r}: upstream's models are {', '.join(FAMILIES)}. Pass one of these.")
    if size not in DEFAULT_STOP:
        raise ValueError(f"Unknown size {size!r}: a synthetic model is one of {', '.join(DEFAULT_STOP)}. Pass one.")
    if stop_after is None:
        return _FAMILIES[family]
    if family == "vc":
        raise ValueError("Voice conversion samples no speech tokens, so it has no stop. Leave stop_after as None.")
    if isinstance(stop_after, bool) or not isinstance(stop_after, int) or not 2 <= stop_after <= _MAX_STOP:
        raise ValueError(
            f"stop_after is {stop_after!r}: upstream's generate samples up to 1000 speech tokens and does not look "
            f"for a stop at the first. Pass an integer from 2 to {_MAX_STOP}, or None."
        )
    return _FAMILIES[family]


def _upstream_class(family: str) -> Any:
    chosen = _FAMILIES[family]
    try:
        module = importlib.import_module(chosen.module)
    except ModuleNotFoundError as error:
        if error.name not in (chosen.module, "chatterbox"):
            raise
        raise ValueError(
            f"The installed chatterbox-tts has no {chosen.module}, so it has no {family!r} model. "
            "Install a release that has it, or choose another family."
        ) from error
    configs = importlib.import_module("chatterbox.models.t3.llama_configs").LLAMA_CONFIGS
    if family == "nano" and "GPT2_small" not in configs:
        raise ValueError(
            "The installed chatterbox-tts lacks the Nano model (no 'GPT2_small' in its LLAMA_CONFIGS). "
            "Install a release that has it, or choose 'turbo'."
        )
    return getattr(module, chosen.name)


def _name_read_by(cls: Any, candidates: tuple[str, ...]) -> str:
    """The candidate that this release's `from_local` spells out, else the newest."""
    spelled = cls.from_local.__func__.__code__.co_consts
    return next((name for name in candidates if name in spelled), candidates[0])


def _write_tokenizer(folder: Path, family: str, cls: Any) -> None:
    chosen = _FAMILIES[family]
    if chosen.tokenizer:
        languages = () if family == "english" else tuple(cls.get_supported_languages())
        size = 704 if family == "english" else 2352  # rows of the smallest text embedding among the releases
        write_grapheme_tokenizer(folder / _name_read_by(cls, chosen.tokenizer), size, languages)
    elif chosen.t3:
        write_gpt2_tokenizer(folder)


def _write_weights(path: Path, weights: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    if path.suffix == ".pt":
        torch.save(dict(weights), path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


@contextmanager
def _initialised_instead_of_loaded(stop_after: int) -> Iterator[None]:
    """Let `from_local` plant weights where it would load them: it then decides about everything else itself."""
    from chatterbox.models.s3gen import S3Gen
    from chatterbox.models.t3 import T3
    from chatterbox.models.voice_encoder import VoiceEncoder

    def instead(plant: Any) -> Any:
        return lambda module, state_dict, strict=True: plant(module)

    with (
        replaced(T3, "load_state_dict", instead(lambda t3: plant_t3(t3, stop_after))),
        replaced(S3Gen, "load_state_dict", instead(plant_s3gen)),
        replaced(VoiceEncoder, "load_state_dict", instead(lambda encoder: None)),
    ):
        yield


def _encode_reference_voice(model: Any, size: str) -> None:
    with ExitStack() as stack:
        if size != "full":
            stack.enter_context(replaced(model, "DEC_COND_LEN", PROMPT_TOKENS * 960))  # 24 kHz samples
        if hasattr(model, "norm_loudness"):  # its gain is a float64 scalar, which NumPy 2 spreads to the waveform
            normed = model.norm_loudness
            stack.enter_context(replaced(model, "norm_loudness", lambda wav, sr: normed(wav, sr).astype(wav.dtype)))
        encode = getattr(model, "set_target_voice", None) or model.prepare_conditionals
        encode(str(reference_voice()))


def _move(model: Any, device: str) -> Any:
    for part in ("t3", "s3gen", "ve"):
        if hasattr(model, part):
            getattr(model, part).to(device)
    if hasattr(model, "conds"):
        model.conds = model.conds.to(device)
    else:
        model.ref_dict = {k: v.to(device) if hasattr(v, "to") else v for k, v in model.ref_dict.items()}
    model.device = device
    return model
