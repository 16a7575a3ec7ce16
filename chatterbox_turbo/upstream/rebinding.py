"""Upstream's own ``from_local`` and ``from_pretrained``, run with other things behind a few of the names they use.

A function finds ``T3`` or ``load_file`` in its module's dictionary. Here its code runs over a copy of that dictionary
in which

- a module class builds without initial values (``runtime.loading.construction``), and the object that it gives assigns
  instead of copying in its first ``load_state_dict``,
- safetensors' ``load_file`` and ``torch.load(weights_only=True)`` give tensors mapped from the file, whatever the
  device,
- ``hf_hub_download`` fetches all files of the checkpoint at once, in parallel, and ``snapshot_download`` demands no
  login (0.1.6 does, for a public repository).

The names are told by what they mean, not by how they are spelled. Which files are read, what is built with which
options, and what is done with it afterwards stays upstream's decision, in every release. Nothing that others see is
written to: no class, module or global, so that threads do not meet.

An app or a launcher may have wrapped the two, to load through this package for instance. A wrapper that names what it
wraps (``__wrapped__``, by functools.wraps or wrapt) is passed by. One that hides it is run as it is; where it comes
back here, that is told.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import ForeignPatchError, ModelUnavailableError, SlowLoadingWarning, TurboError
from ..runtime.loading.construction import OwnRandomness, UnfamiliarConstructionError, construct, fill
from ..runtime.loading.mapped_files import MappedFiles
from . import quantized_checkpoint
from .quantized_checkpoint import QuantizedCheckpoint

_FILES = (".safetensors", ".pt", ".json")


_WRAPPED = "where it is a wrapper, let it name what it wraps as __wrapped__ (functools.wraps)"


@dataclass
class _Run:
    """A loader that runs; ``nested``: one of this module's runs inside it."""

    cls: Any
    name: str
    nested: bool = False


_running: ContextVar[tuple[_Run, ...]] = ContextVar("running", default=())


def from_local(cls: Any, folder: Path, device: str, mapped: bool = False, **options: Any) -> Any:
    """What ``cls.from_local(folder, device, **options)`` returns, in less time and memory.

    ``mapped``: leave weights that are on the CPU in the pages of their files. Where upstream's code does something that
    is not known here, it runs as it is, with a ``SlowLoadingWarning`` that says why.

    Raises:
        ModelUnavailableError: a file is missing, damaged, or does not fit.
        ForeignPatchError: a wrapper of it that hides the original calls this function.
        Exception: what upstream's own raises otherwise.
    """
    cls = vars(cls).get("stands_for", cls)
    quantized = quantized_checkpoint.read(Path(folder))
    if quantized:
        quantized.check_content(Path(folder))
    with once(cls, "from_local") as run:
        loading = Loading(device, mapped, quantized)
        try:
            model = loading.run(cls, folder, options)
            problem = "" if run.nested else loading.problem()
        except (TurboError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # upstream's own decides whether it is one
            model, problem = None, f"{type(error).__name__}: {error}"
        if problem and quantized:  # upstream's own cannot read it
            raise ModelUnavailableError(f"{cls.__name__} cannot be loaded from a quantized checkpoint: {problem}.")
        if model is None or (problem and loading.built):  # nothing, or of ours and half filled
            model = cls.from_local(folder, device, **options)
    if problem:
        _warn_slow(cls, "from_local", problem)
    return model


def from_pretrained(
    cls: Any, device: str, mapped: bool = False, load: Callable[..., Any] | None = None, **options: Any
) -> Any:
    """``cls.from_pretrained(device, **options)``: the files that it asks for, then ``from_local`` of this module.

    ``load``: called in the place of this (class, folder, device). Errors as there, and what the hub's client raises.
    """
    import huggingface_hub

    cls = vars(cls).get("stands_for", cls)
    load = staticmethod(partial(load, cls) if load else partial(from_local, cls, mapped=mapped))
    stand_in = type(cls.__name__, (cls,), {"from_local": load, "stands_for": cls})
    function = original(cls.from_pretrained)

    def replacement(value: Any) -> Any:
        if value is huggingface_hub.hf_hub_download:
            return _in_parallel(function.__code__)
        return _without_demand(value) if value is huggingface_hub.snapshot_download else None

    with once(cls, "from_pretrained") as run:
        if function is None:
            model = stand_in.from_pretrained(device, **options)
        else:
            model = MethodType(_rebound(function, _names(function, replacement)), stand_in)(device, **options)
    if not run.nested:
        _warn_slow(cls, "from_pretrained", f"it does not call the class's from_local; {_WRAPPED}")
    return model


@contextmanager
def once(cls: Any, name: str) -> Iterator[_Run]:
    """Refuse to run a class's loader inside itself."""
    running = _running.get()
    if any(run.cls is cls and run.name == name for run in running):
        raise ForeignPatchError(
            f"{cls.__name__}.{name} calls chatterbox_turbo.load, which calls it again.",
            "It is a wrapper that hides upstream's own, so that load cannot pass it by.",
            f"Let the wrapper name what it wraps: @functools.wraps of the {name} that was there before.",
        )
    for outer in running:
        outer.nested = True
    run = _Run(cls, name)
    token = _running.set((*running, run))
    try:
        yield run
    finally:
        _running.reset(token)


def running() -> bool:
    """Whether this package loads a model in this thread: a launcher's wrapper of a loader stays out of that."""
    return bool(_running.get())


def _warn_slow(cls: Any, name: str, problem: str) -> None:
    message = f"{cls.__name__} was loaded by upstream's own {name}, at its speed and memory: {problem}"
    warnings.warn(message, SlowLoadingWarning, stacklevel=5)


class Loading:
    """One call of ``from_local``.

    Attributes:
        files: what it reads.
        tensors: of each file of weights that it has read so far, by the name that upstream calls it.
        built: modules that await their values, or have got them.
    """

    def __init__(self, device: str, mapped: bool, quantized: QuantizedCheckpoint | None = None):
        self._device, self._quantized = device, quantized
        self.files = MappedFiles(keep=mapped)
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.built: list[nn.Module] = []

    def run(self, cls: Any, folder: Path, options: dict[str, Any]) -> Any:
        function = original(cls.from_local)
        if function is None:
            raise UnfamiliarConstructionError(f"{cls.__name__}.from_local is no class method written in Python")
        names = _names(function, self._replacement)
        with OwnRandomness():  # for what is built without us: the watermarker
            model = MethodType(_rebound(function, names), cls)(folder, self._device, **options)
        if self._quantized:
            voices = function.__globals__.get("Conditionals")
            self._quantized.give_voice(model, voices, Path(folder), self.files, self._device)
        return model

    def problem(self) -> str:
        """What kept this from being fast, or an empty string."""
        if not self.built:
            return f"from_local builds no module that can be seen; {_WRAPPED}"
        waiting = [type(module).__name__ for module in self.built if "load_state_dict" in vars(module)]
        return f"from_local fills {waiting[0]} by other means than load_state_dict" if waiting else ""

    def _replacement(self, value: Any) -> Any:
        from safetensors.torch import load_file

        if isinstance(value, type) and issubclass(value, nn.Module):
            return partial(self._build, value)
        if value is load_file:
            return lambda filename, device="cpu": self._read(Path(filename))
        if value is torch:
            return _TorchWith(load=self._load)
        return None

    def _build(self, cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        module = construct(cls, *args, **kwargs)

        def load_state_dict(state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            del module.load_state_dict  # from here on the class's own
            return self._fill(module, state_dict, strict)

        module.load_state_dict = load_state_dict
        self.built.append(module)
        return module

    def _fill(self, module: nn.Module, state: Any, strict: bool) -> Any:
        path, device = self.files.path_of(state), torch.device(self._device)
        if self._quantized and path is not None and path.name == self._quantized.t3:
            state = self._quantized.put_into(module, state, path, device)
        return fill(module, state, self.files, device, strict)

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        found = self._quantized.file_for(path) if self._quantized else None
        tensors = self.tensors[path.name] = self.files.safetensors(found or path)
        quantized_checkpoint.check_foreign(tensors, path)
        return tensors

    def _load(self, f: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("weights_only") and isinstance(f, str | Path):
            path = Path(f)
            if self._quantized and self._quantized.file_for(path):
                return self._read(path)
            tensors = self.files.archive(path)
            if tensors is not None:
                self.tensors[path.name] = tensors
                return tensors
        return torch.load(f, *args, **kwargs)


class _TorchWith(ModuleType):
    """The module torch with some of its functions replaced, for one caller."""

    def __init__(self, **functions: Any):
        super().__init__("torch")
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def original(method: Any) -> FunctionType | None:
    """The function of a class method, below all wrappers that name what they wrap.

    ``None`` where it is something else (compiled, wrapped by an object, no class method).
    """
    inner = inspect.unwrap(method)
    if inner is method and isinstance(method, FunctionType):
        return None
    function = getattr(inner, "__func__", inner)
    return function if isinstance(function, FunctionType) else None


def _names(function: FunctionType, replacement: Callable[[Any], Any]) -> dict[str, Any]:
    """What ``replacement`` gives for each name in the function's module, where it gives something."""
    known = function.__globals__.items()
    return {name: other for name, value in known if (other := replacement(value)) is not None}


def _rebound(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """A function of the same code that finds other things under some names."""
    twin = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def spelled_out(code: CodeType) -> list[str]:
    """The strings that code has in it, those of its tuples too."""
    items = (item for one in code.co_consts for item in (one if isinstance(one, tuple) else [one]))
    return [item for item in items if isinstance(item, str)]


def _in_parallel(code: CodeType) -> Callable[..., str]:
    """``hf_hub_download`` that fetches, with the first file of a checkpoint, all others that the code spells out."""
    import huggingface_hub

    files = [name for name in spelled_out(code) if Path(name).suffix in _FILES]
    folders: dict[str, Path] = {}

    def download(repo_id: str, filename: str, **options: Any) -> str:
        if filename in files and not options:
            if repo_id not in folders:
                folders[repo_id] = Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=files))
            if (folders[repo_id] / filename).exists():
                return str(folders[repo_id] / filename)
        return huggingface_hub.hf_hub_download(repo_id, filename, **options)

    return download


def _without_demand(snapshot_download: Callable[..., str]) -> Callable[..., str]:
    """``snapshot_download`` that takes a token where there is one, and goes without where there is none."""

    def download(*args: Any, token: Any = None, **options: Any) -> str:
        return snapshot_download(*args, token=None if token is True else token, **options)

    return download
