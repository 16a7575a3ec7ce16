"""Shared models: one tiny synthetic model a family and test session, put back after every test that used it."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
import zlib
from collections import defaultdict
from pathlib import Path

# before torch is imported: tiny models run faster on one thread, and busy machines do not stall the suite
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

for name in [name for name in os.environ if name.startswith("CHATTERBOX_TURBO__")]:
    del os.environ[name]  # a developer's own overrides must not decide what is tested


def pytest_configure(config):
    """What numba keeps of a kernel follows the file of that kernel alone, not the files of what it calls."""
    files = sorted((Path(__file__).parents[1] / "chatterbox_turbo" / "runtime" / "cpu").glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    if hasattr(config, "cache"):
        folder = str(config.cache.mkdir(f"kernels-{digest}"))
    else:  # -p no:cacheprovider
        folder = tempfile.mkdtemp(prefix="kernels-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["NUMBA_CACHE_DIR"] = folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What is measured of this machine stays in this session."""
    os.environ["CHATTERBOX_TURBO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def models():
    """``models(family)``: a tiny model with a voice that stops after 12 tokens, built once."""
    import torch
    from cases import require

    from chatterbox_turbo import synthetic

    built = {}

    def get(family: str):
        require(family)
        if family not in built:
            with warnings.catch_warnings(), torch.inference_mode(False):  # whatever the first test that asks is under
                warnings.simplefilter("ignore")
                built[family] = synthetic.build(family, "tiny", stop_after=None if family == "vc" else 12)
        return built[family]

    return get


@pytest.fixture
def model(models, request):
    """The model of the family that a test is parametrized with (``indirect``), reverted afterwards."""
    import chatterbox_turbo as turbo

    built = models(request.param)
    yield built
    turbo.revert(built)


class SimulatedModels:
    """``get(family, device)``: a tiny model with a voice on the simulated machine, built once a session."""

    def __init__(self, machine):
        self.machine, self._built, self.used = machine, {}, []

    def get(self, family: str, device: str = "cuda:0"):
        from chatterbox_turbo import synthetic

        if (family, device) not in self._built:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stop_after = {"vc": None, "multilingual": 10}.get(family, 14)  # operations take longer than on a CPU
                self._built[family, device] = synthetic.build(family, "tiny", device=device, stop_after=stop_after)
        self.used.append(self._built[family, device])
        return self._built[family, device]


@pytest.fixture(scope="session")
def _simulated_models():
    from simulated_cuda import Machine

    return SimulatedModels(Machine())


@pytest.fixture
def simulated(_simulated_models):
    """``simulated.machine`` in the place of ``torch.cuda``, and models on it (``get``), reverted afterwards."""
    from simulated_cuda import simulated_cuda, unsupported

    import chatterbox_turbo as turbo

    if unsupported():
        pytest.skip(unsupported())
    with simulated_cuda(machine=_simulated_models.machine):
        _simulated_models.machine.forget()
        try:
            yield _simulated_models
        finally:
            for model in _simulated_models.used:
                turbo.revert(model)
            _simulated_models.used.clear()


@pytest.fixture
def english(models):
    import chatterbox_turbo as turbo

    built = models("english")
    yield built
    turbo.revert(built)


@pytest.fixture(scope="module")
def fresh():
    """``fresh(family)``: tiny models of a test module's own, whose parts it may replace."""
    from chatterbox_turbo import synthetic

    built = {}

    def get(family):
        if family not in built:
            built[family] = synthetic.build(family, "tiny", stop_after=None if family == "vc" else 12)
        return built[family]

    return get


@pytest.fixture(scope="session")
def voice() -> str:
    """Path of a recording that is not much longer than the 5 s that Turbo asks for."""
    from cases import recording

    return recording(5.2)


@pytest.fixture(scope="session")
def samples():
    """The whole reference voice, 11 s, (n,) float32 at 24 kHz."""
    import soundfile

    from chatterbox_turbo import synthetic

    return soundfile.read(synthetic.reference_voice(), dtype="float32")[0]


@pytest.fixture
def kept(models):
    """``kept(family)``: the session's model; reverted and given its voice back afterwards."""
    import chatterbox_turbo as turbo
    from chatterbox_turbo.upstream.families import identify

    used = []

    def get(family):
        model = models(family)
        used.append((model, identify(model).voice))
        return model

    yield get
    for model, voice in used:
        turbo.revert(model)
        setattr(model, "ref_dict" if hasattr(model, "ref_dict") else "conds", voice)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """``saved(family)``: the folder of a tiny checkpoint that stops after 16 tokens, written once; for reading only."""
    from cases import require

    from chatterbox_turbo import synthetic

    folders = {}

    def get(family: str):
        require(family)
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            folders[family] = synthetic.save(folder, family, stop_after=None if family == "vc" else 16)
        return folders[family]

    return get


@pytest.fixture
def copy(saved, tmp_path):
    """``copy(family)``: such a folder for writing."""
    return lambda family: Path(shutil.copytree(saved(family), tmp_path / family))


@pytest.fixture
def prebuilt(models, monkeypatch):
    """Commands in this process get the session's models instead of building theirs."""
    import chatterbox_turbo as turbo
    from chatterbox_turbo import synthetic

    used, real = [], synthetic.build

    def build(family, size="tiny", stop_after=None, seed=0, device="cpu"):
        with monkeypatch.context() as patch:
            patch.setattr(synthetic, "build", real)
            used.append(models(family))
        return used[-1]

    monkeypatch.setattr(synthetic, "build", build)
    yield
    for model in used:
        turbo.revert(model)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No cached weights, and a hub that cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def nothing_global_changes():
    """What is global is after the test what it was before, errors included."""
    from loading_tools import global_state

    before = global_state()
    yield
    assert global_state() == before


@pytest.hookimpl(tryfirst=True)  # before -m looks at marks
def pytest_collection_modifyitems(items):
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    for several in _by_family(items):
        quick = zlib.crc32(several[0].originalname.encode()) % len(several)
        for item in several[:quick] + several[quick + 1 :]:
            item.add_marker(pytest.mark.exhaustive)


def _by_family(items):
    """Tests that differ in the model's family alone: one of each is quick, the families in turn by the test's name."""
    from cases import FAMILIES

    groups = defaultdict(list)
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        family = next((value for value in given if isinstance(value, str) and value in FAMILIES), None)
        if family and not item.get_closest_marker("each_family"):
            others = item.callspec.id.split("-")
            others.remove(family)
            groups[(item.path, item.originalname, *others)].append(item)
    return groups.values()
