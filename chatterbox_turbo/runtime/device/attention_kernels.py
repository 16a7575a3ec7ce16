"""Kernels for attention: which there are, why one cannot be had on a device, and how each is called.

``torch.nn.attention.sdpa_kernel`` forbids kernels to the whole process while its body runs, so that another thread's
model would compute by another one, or fail. Here a kernel is called by its own operator instead, and no switch is
touched. What torch does before it calls one (masks in aligned rows, expanded to all queries) is done by whoever makes
the mask, and here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import describe

HALF = (torch.float16, torch.bfloat16)
WIDEST = 256  # heads, of flash-attn and of torch's own flash kernel
FIRST_FLASH_ATTENTION = (2, 1)  # flash-attn: its functions have had their names and causal masks since
ON = {"cpu": ("flash", "math"), "cuda": ("flash", "efficient", "math", "cudnn")}


class Wanted(NamedTuple):
    """``name``: ``sdpa``, ``flash_attention_2`` or ``eager``; ``kernel``: of ``sdpa``, ``auto`` for torch's choice."""

    name: str
    kernel: str = "auto"

    def __str__(self) -> str:
        return f"sdpa ({self.kernel})" if self.name == "sdpa" and self.kernel != "auto" else self.name


class Boundaries(NamedTuple):
    """Rows and what lies behind each, as sequences one after the other: what flash-attn reads instead of a mask.

    Attributes:
        ends: (2 R + 1,) int32, where each begins and the last one ends: row 0, its padding, row 1, and so on.
        longest: positions of a whole row.
    """

    ends: Tensor
    longest: int


@dataclass(frozen=True)
class Kernel:
    """Attention of queries, keys and values (R, H, T, Dh): (R, H, T, Dh) in their format.

    ``hide``: from what is added to the scores, (R, 1, 1, T) of 0 and -inf or ``None``, to what ``attend`` takes; to be
    called once for all layers. No host sync in either, and no shape that depends on values: both can be captured.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, Any, bool], Tensor]
    hide: Callable[[Tensor | None], Any] = lambda bias: bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, hidden: Any = None, causal: bool = False) -> Tensor:
        """``hidden``: from ``hide``, or (R, H, T, T) to add; or ``causal``: no position sees what is behind it."""
        return self.attend(q, k, v, hidden, causal)


def choose(
    wanted: Wanted | None, dtype: torch.dtype, device: torch.device, width: int, positions: bool = False
) -> tuple[Kernel | None, str]:
    """The kernel that is wanted and a remark for the report; ``None``, which is the package's own choice, without one.

    Args:
        dtype, width: of the heads.
        positions: scores of relative positions are added.
    """
    if wanted is None:
        return None, ""
    reason = why_not(wanted, dtype, device, width, positions)
    if reason:
        return None, f"attention not by {wanted}: {reason}"
    remark = f"attention by {wanted}"
    if wanted.kernel == "flash" and device.type == "cuda":
        remark += ", by sdpa (efficient) where frames are hidden"
    return kernel_for(wanted, device), remark


def why_not(wanted: Wanted, dtype: torch.dtype, device: torch.device, width: int, positions: bool = False) -> str:
    """Why attention cannot be computed so, or an empty string, once it has agreed with the definition on a small case.

    Nothing is changed, and no random number drawn.
    """
    reason = ""
    if wanted.name == "flash_attention_2":
        reason = _no_flash_attention(dtype, device, width, positions)
    elif wanted.kernel != "auto":
        reason = _no_kernel_of_torch(wanted.kernel, dtype, device, width, positions)
    if reason:
        return reason
    try:
        return _disagreement(kernel_for(wanted, device), dtype, device, width, positions)
    except Exception as error:  # a build without it, a driver that is too old, a release with another signature
        return describe(error)


def kernel_for(wanted: Wanted, device: torch.device) -> Kernel:
    """The kernel, whether it runs here or not."""
    if wanted.name == "eager":
        return Kernel(str(wanted), eager)
    if wanted.name == "flash_attention_2":
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        return Kernel(str(wanted), _flash_attention(flash_attn_func, flash_attn_varlen_func), _boundaries)
    attend = {"auto": _any, "math": _math, "efficient": _efficient, "cudnn": _cudnn, "flash": _flash_on_cuda}
    flash_on_cpu = wanted.kernel == "flash" and device.type == "cpu"
    return Kernel(str(wanted), _flash_on_cpu if flash_on_cpu else attend[wanted.kernel])


def _no_kernel_of_torch(kernel: str, dtype: torch.dtype, device: torch.device, width: int, positions: bool) -> str:
    if kernel not in ON.get(device.type, ("math",)):
        others = " and ".join(ON.get(device.type, ("math",)))
        return f"torch has no {kernel} kernel for {device.type}; there it has {others}"
    if device.type != "cuda" or kernel in ("math", "efficient"):
        return ""
    if dtype not in HALF:
        return f"torch's {kernel} kernel computes in half precision on CUDA, and this is {_name(dtype)}"
    if width % 8 or width > WIDEST:
        return f"torch's {kernel} kernel takes heads of a multiple of 8 up to {WIDEST}, these have {width}"
    if kernel == "flash" and positions:
        return "torch's flash kernel adds nothing to the scores on CUDA, and these have relative positions"
    return _too_old(device, f"torch's {kernel} kernel")


def _no_flash_attention(dtype: torch.dtype, device: torch.device, width: int, positions: bool) -> str:
    if positions:
        return "flash-attn adds nothing to the scores, and these have relative positions"
    if device.type != "cuda":
        return f"flash-attn needs a CUDA device, the model is on {device.type}"
    if dtype not in HALF:
        return f"flash-attn computes in float16 and bfloat16, and this is {_name(dtype)} (see precision)"
    if width % 8 or width > WIDEST:
        return f"flash-attn takes heads of a multiple of 8 up to {WIDEST}, these have {width}"
    if reason := _too_old(device, "flash-attn"):
        return reason
    try:
        import flash_attn
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
        return f"flash-attn does not load: {describe(error)}"
    except Exception as error:  # built for another torch: a symbol is missing
        return f"flash-attn does not load: {describe(error)}"
    version = str(getattr(flash_attn, "__version__", "of no version"))
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if number < FIRST_FLASH_ATTENTION:
        return f"flash-attn {version} is too old: {'.'.join(map(str, FIRST_FLASH_ATTENTION))} or newer is needed"
    return ""


def _too_old(device: torch.device, what: str) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"{what} needs capability 8.0, this GPU has {major}.{minor}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def _disagreement(kernel: Kernel, dtype: torch.dtype, device: torch.device, width: int, positions: bool) -> str:
    """What a kernel gives for few short heads, causal and with hidden keys, is compared with ``eager`` in fp32."""
    rows, heads, frames = 2, 2, 24
    numbers = torch.arange(3 * rows * heads * frames * width, dtype=torch.float32, device=device)
    laid = (numbers * 0.37).sin().view(3, rows, frames, heads, width).to(dtype)
    q, k, v = laid.transpose(2, 3).unbind(0)
    bias = torch.zeros(rows, 1, 1, frames, dtype=torch.float32, device=device)
    bias[0, ..., 17:] = -float("inf")
    added = bias.expand(rows, heads, frames, frames).to(dtype).contiguous()
    cases = {
        "causal": (lambda: kernel(q, k, v, causal=True), None),
        "whole": (lambda: kernel(q, k, v, kernel.hide(None)), torch.zeros_like(bias)),
        "hidden": (lambda: kernel(q, k, v, kernel.hide(bias.to(dtype))), bias),
    }
    if positions:
        cases = {"added": (lambda: kernel(q, k, v, added), bias)}
    bound = 2e-3 if dtype == torch.float32 else 5e-2  # rounding, also that of TF32 where it is on; a fault is larger
    for name, (given, mask) in cases.items():
        expected = eager(q.float(), k.float(), v.float(), mask, causal=mask is None)
        difference = (given().float() - expected).abs()
        difference[0, :, 17:] *= name in ("causal", "whole")  # queries that are hidden too mean nothing
        error = (difference.max() / expected.abs().max()).item()
        if not error < bound:
            return f"it differs from the definition by {error:.1e} ({name})"
    return ""


# -- the kernels -------------------------------------------------------------------------------------------------


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """Two products and a softmax in fp32 between them, with all scores in memory."""
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if causal:
        places = torch.arange(q.size(-2), device=q.device)
        scores = scores.masked_fill(places > places[:, None], -float("inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


def _any(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)


def _math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, bias, 0.0, causal)[0]


def _flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)[0]


def _flash_on_cuda(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    if bias is not None:  # the one thing that it does not take
        return _efficient(q, k, v, bias, causal)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    bias = _for_all(bias, q, k)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, 0.0, causal)[0]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    bias = _for_all(bias, q, k)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False, 0.0, causal)[0]


def _for_all(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """(R, H, T, T) without a copy."""
    return None if bias is None else bias.expand(*q.shape[:3], k.size(2))


def _boundaries(bias: Tensor | None) -> Boundaries | None:
    """Padding is a sequence of its own that attends to itself, so that shapes are the same for every length."""
    if bias is None:
        return None
    rows, frames = bias.size(0), bias.size(-1)
    lengths = (bias.view(rows, frames) == 0).sum(dim=-1, dtype=torch.int32)
    starts = torch.arange(rows, dtype=torch.int32, device=bias.device) * frames
    ends = torch.stack([starts, starts + lengths], dim=1).flatten()
    return Boundaries(F.pad(ends, (0, 1), value=rows * frames), frames)


def _flash_attention(whole: Callable[..., Tensor], several: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """flash-attn's functions over (R, T, H, Dh), and over (R T, H, Dh) with boundaries."""

    def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Boundaries | None, causal: bool) -> Tensor:
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        scale = q.size(-1) ** -0.5
        if hidden is None:
            return whole(q, k, v, softmax_scale=scale, causal=causal).transpose(1, 2)
        ends, longest = hidden
        one_after_another = (one.flatten(0, 1) for one in (q, k, v))
        attended = several(
            *one_after_another,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=causal,
        )
        return attended.unflatten(0, (-1, longest)).transpose(1, 2)

    return attend
