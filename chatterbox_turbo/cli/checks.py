"""What ``doctor`` looks at, as data."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import describe
from ..upstream.class_names import CLASSES
from .machine import cpu_model, version

if TYPE_CHECKING:
    import torch

UPSTREAM = "chatterbox-tts"
KNOWN_UPSTREAM = ("0.1.4", "0.1.5", "0.1.6", "0.1.7")
REINSTALL = f"pip install '{UPSTREAM}=={KNOWN_UPSTREAM[-1]}'"
OPTIONAL = {"matplotlib": "the picture of demo", "psutil": "memory of a process outside Linux"}


@dataclass(frozen=True)
class Check:
    """One finding: ok, warning (something is skipped or unproved) or error (something cannot work)."""

    name: str
    status: Literal["ok", "warning", "error"]
    detail: str
    remedy: str = ""


def all_checks(announce: Callable[[str], None] = lambda step: None) -> Iterator[Check]:
    """Every check, in order; later ones build on earlier ones and say so where those failed."""
    yield python()
    announce("torch")
    torch = torch_release()
    yield torch
    if torch.status == "error":
        return
    yield from _found("devices", devices)
    yield from _found(UPSTREAM, distribution)
    announce("PerTh")
    watermark = perth()
    yield watermark
    for family in CLASSES:
        announce(f"patch points of {family}")
        yield from _found(f"model {family}", partial(patch_points, family, usable=watermark.status != "error"))
    yield from _found("environment", configuration)
    yield from _found("launcher", launcher)
    for package, purpose in OPTIONAL.items():
        yield optional(package, purpose)


def _found(name: str, look: Callable[[], Check | Iterator[Check]]) -> Iterator[Check]:
    """What a look finds; that it fails, where a package is missing or broken, is a finding beside the others."""
    try:
        found = look()
        yield from [found] if isinstance(found, Check) else found
    except Exception as error:  # packages raise what they like when they are imported
        remedy = "pip check names what is missing." if isinstance(error, ImportError) else ""
        yield Check(name, "error", describe(error), remedy)


def python() -> Check:
    """The interpreter."""
    return Check("python", "ok", f"{platform.python_version()} at {sys.prefix}")


def torch_release() -> Check:
    """PyTorch, which everything here needs."""
    try:
        import torch
    except Exception as error:  # a broken installation raises what it likes
        return Check("torch", "error", f"cannot be imported: {error}", "pip install 'torch>=2.5'")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 5):
        return Check("torch", "error", torch.__version__, "pip install 'torch>=2.5'")
    return Check("torch", "ok", f"{torch.__version__}, transformers {version('transformers') or 'not installed'}")


def devices() -> Iterator[Check]:
    """The processor and each GPU, with what half precision gains there."""
    import torch

    from ..runtime.device.devices import best_device
    from ..runtime.device.half_precision import cpu_flags

    flags = ", ".join(sorted(cpu_flags()))
    half = f"half precision: {flags}" if flags else "no half-precision instructions known: fp32 is the fast format"
    yield Check("cpu", "ok", f"{cpu_model()}, {torch.get_num_threads()} threads; {half}")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if major >= 8:
            half = "bf16, fp16 and TF32"
        elif major == 7:
            half = "fp16 only (bf16 is emulated and slower than fp32)"
        else:
            half = "none that is faster than fp32"
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        name = torch.cuda.get_device_name(index)
        yield Check(f"cuda:{index}", "ok", f"{name}, {memory:.0f} GiB, capability {major}.{minor}; {half}")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Check("cuda", "ok", f"no device ({built})")
    yield preset(torch.device(best_device()))


def preset(device: torch.device) -> Check:
    """The preset that is meant for this machine's best device."""
    from ..budget.machine import Machine

    here = Machine.of(device)
    name, reason = here.preset()
    return Check("preset", "ok", f"recommended on {device}: {name} ({reason})")


def distribution() -> Check:
    """Whether ``chatterbox`` is a release of chatterbox-tts that is known, or a fork or vendored copy."""
    spec = importlib.util.find_spec("chatterbox")
    if spec is None or not spec.submodule_search_locations:
        return Check(UPSTREAM, "error", "not installed", REINSTALL)
    place = Path(next(iter(spec.submodule_search_locations))).resolve()
    owners = metadata.packages_distributions().get("chatterbox", [])
    try:
        installed = metadata.distribution(UPSTREAM)
    except metadata.PackageNotFoundError:
        origin = f"the distribution {owners[0]}" if owners else "no distribution: a vendored copy"
        return Check(UPSTREAM, "warning", f"{place} comes from {origin}", f"If passes are skipped: {REINSTALL}")
    home = Path(str(installed.locate_file("chatterbox"))).resolve()
    if home != place and not installed.read_text("direct_url.json"):
        detail = f"{place} hides the installed release in {home}"
        return Check(UPSTREAM, "warning", detail, "Start from another folder, or take the copy off the path.")
    foreign = [owner for owner in owners if owner != UPSTREAM]
    if foreign:
        return Check(UPSTREAM, "warning", f"{', '.join(foreign)} installs over the same package", REINSTALL)
    if installed.version not in KNOWN_UPSTREAM:
        detail = f"{installed.version}: not one of the releases that this package knows ({', '.join(KNOWN_UPSTREAM)})"
        return Check(UPSTREAM, "warning", detail, "Run chatterbox-turbo verify before relying on it.")
    return Check(UPSTREAM, "ok", installed.version)


def perth() -> Check:
    """PerTh's watermarker, which exports ``None`` instead of failing where ``pkg_resources`` is missing."""
    try:
        import perth as package
    except Exception as error:
        return Check("watermark", "error", f"PerTh cannot be imported: {error}", "pip install resemble-perth")
    if getattr(package, "PerthImplicitWatermarker", None) is not None:
        return Check("watermark", "ok", f"PerTh {version('resemble-perth')}")
    try:
        import pkg_resources  # noqa: F401
    except ImportError:
        detail = "PerthImplicitWatermarker is None, for pkg_resources is missing: no model can be constructed"
        return Check("watermark", "error", detail, "pip install 'setuptools<81'")
    detail = "PerthImplicitWatermarker is None: no model can be constructed"
    return Check("watermark", "error", detail, "pip install --force-reinstall resemble-perth")


def patch_points(family: str, usable: bool = True) -> Iterator[Check]:
    """Every patch point of one family, looked at on a tiny synthetic model of upstream's own class.

    One line if all fit, otherwise one for each that does not. ``usable``: whether a model can be constructed.
    """
    from .. import synthetic
    from ..upstream.families import identify
    from ..upstream.patch_points import check_all
    from .loading import why_unavailable

    name = f"model {family}"
    reason = why_unavailable(family)
    if reason:
        # a release without the class is complete in itself; one whose class does not import is broken
        broken = reason.startswith("Cannot import") and not reason.startswith("Cannot import ChatterboxTurboTTS")
        yield Check(name, "error" if broken else "ok", reason, REINSTALL if broken else "")
        return
    if not usable:
        yield Check(name, "warning", "not looked at: without PerTh no model can be constructed", "See watermark.")
        return
    try:
        parts = identify(synthetic.build(family, "tiny"))
    except Exception as error:  # a fork's constructor raises what it likes
        yield Check(name, "error", f"cannot be constructed: {type(error).__name__}: {error}", REINSTALL)
        return
    findings = check_all(parts)
    for finding in findings:
        if finding.problem and finding.forceable:
            remedy = "Passes that replace it are skipped. If its behaviour is upstream's, set their enabled = true."
            yield Check(name, "warning", f"fork or unknown release: {finding.problem}", remedy)
        elif finding.problem:
            yield Check(name, "error", finding.problem, REINSTALL)
    if not any(finding.problem for finding in findings):
        weights = "cached" if _cached(family) else "not cached"
        yield Check(name, "ok", f"{len(findings)} patch points fit; real weights {weights}")


def configuration() -> Check:
    """Environment variables that override every configuration."""
    from ..config import resolve
    from ..config.files import ENV_PREFIX, environment
    from ..errors import InvalidConfigError

    try:
        overrides = environment()
        resolve(None)
    except InvalidConfigError as error:
        return Check("environment", "error", str(error), f"Correct or unset the {ENV_PREFIX}… variable.")
    return Check("environment", "ok", f"overrides: {overrides}" if overrides else f"no {ENV_PREFIX}… variables")


def launcher() -> Check:
    """Whether programs of this environment look for ``CHATTERBOX_TURBO``, and what it names here."""
    from ..config import resolve
    from ..errors import InvalidConfigError
    from ..launch import site_file
    from ..launch.program import ON_PATH
    from ..launch.settings import CONFIG, from_environment

    state, settings = site_file.state(), from_environment()
    detail = f"not enabled ({site_file.path()} is not there)" if state == "disabled" else f"{state}: {site_file.path()}"
    detail += f"; {CONFIG} is {settings.config}" if settings else f"; {CONFIG} is not set"
    if state == "outdated":
        return Check("launcher", "warning", detail, "chatterbox-turbo enable")
    if settings:
        try:
            resolve(settings.config)
        except InvalidConfigError as error:
            return Check("launcher", "warning", f"{detail}: {error}", f"Correct or unset {CONFIG}.")
        if state == "disabled" and str(ON_PATH) not in os.environ.get("PYTHONPATH", ""):
            remedy = "chatterbox-turbo enable, or start the program with chatterbox-turbo run."
            return Check("launcher", "warning", f"{detail}, and nothing looks for it", remedy)
    return Check("launcher", "ok", detail)


def optional(package: str, purpose: str) -> Check:
    """A package that only one feature needs."""
    if version(package):
        return Check(package, "ok", f"{version(package)}, for {purpose}")
    return Check(package, "warning", f"not installed; needed for {purpose}", f"pip install {package}")


def _cached(family: str) -> bool:
    from ..upstream.loading import is_cached

    return is_cached(family)
