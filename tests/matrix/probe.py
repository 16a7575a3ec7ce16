"""Run inside an environment: prints, as JSON, what is installed and what the plan of each family skips there.

Needs nothing but this package; a family that the release does not have is told with the reason.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("chatterbox-tts", "transformers", "torch", "torchaudio", "numpy", "numba", "safetensors", "setuptools")
FAMILIES = ("english", "multilingual", "turbo", "nano", "vc")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def plan(family: str) -> dict[str, dict[str, str]] | str:
    """Status and reason of each pass under the preset ``auto``; the reason where there is no such model."""
    import chatterbox_turbo as turbo
    from chatterbox_turbo import synthetic
    from chatterbox_turbo.errors import ModelUnavailableError
    from chatterbox_turbo.upstream.loading import model_class

    try:
        model_class(family)
    except ModelUnavailableError as error:
        return str(error).splitlines()[0]
    model = synthetic.build(family, "tiny")
    return {step.name: {"status": step.status, "reason": step.reason} for step in turbo.inspect(model).steps}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        told = {"versions": versions(), "plans": {family: plan(family) for family in FAMILIES}}
    print(json.dumps(told))
