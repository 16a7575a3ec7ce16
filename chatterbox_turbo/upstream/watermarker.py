"""PerTh's watermarker: telling the real one from a stand-in, and observing it without writing to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import wrapt

REMEDY = "pip install 'setuptools<81' (PerTh needs pkg_resources), then load the model again"


def why_not_perth(watermarker: Any) -> str:
    """Why outputs of this watermarker carry no PerTh mark; empty for the real one."""
    if watermarker is None:
        return f"the model has no watermarker: {REMEDY}"
    network = getattr(watermarker, "perth_net", None)
    if network is None or not hasattr(network, "encoder") or not hasattr(network, "decoder"):
        kind = f"{type(watermarker).__module__}.{type(watermarker).__qualname__}"
        return f"the model's watermarker is a {kind}, not PerTh's: its outputs carry no PerTh watermark"
    return ""


class ObservedWatermarker(wrapt.ObjectProxy):
    """A watermarker whose ``apply_watermark`` goes through ``around(apply, signal, sample_rate, options)``.

    A proxy on the model rather than a patch on the watermarker, because servers share one watermarker between
    models; type checks and attribute access reach the real object.
    """

    def __init__(self, watermarker: Any, around: Callable[[Callable, Any, int, dict], Any]):
        super().__init__(watermarker)
        self._self_around = around

    def apply_watermark(self, signal: Any, sample_rate: int, **options: Any) -> Any:
        """Signal (n,) float32 in, marked signal (n,) float32 out, both at ``sample_rate`` Hz."""
        return self._self_around(self.__wrapped__.apply_watermark, signal, sample_rate, options)
