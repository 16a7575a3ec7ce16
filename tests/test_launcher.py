"""Models that a program loads, as the launcher has them: in this process, with upstream's real classes."""

from __future__ import annotations

import gc
import importlib
import json
import os
import threading
import weakref
from contextlib import nullcontext

import perth
import pytest
import torch
from cases import FAMILIES, has, speak
from loading_tools import assert_equal, differences, in_cache, upstreams

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.launch import hooks, messages
from chatterbox_turbo.launch.settings import Settings
from chatterbox_turbo.upstream.class_names import LOADERS
from chatterbox_turbo.upstream.loading import load_own, model_class

EXACT = "exact.toml"


@pytest.fixture
def launched(tmp_path):
    """``launched(config, …)`` has the launcher in this process; classes as before afterwards."""
    (tmp_path / EXACT).write_text('preset = "exact"\ndecoding = { progress = "off" }\n')
    classes = {model_class(family) for family in FAMILIES if has(family)}
    before = [dict(vars(cls)) for cls in classes]
    messages._said.clear()

    def launch(config=EXACT, **settings):
        name = str(tmp_path / config) if "." in config else config
        hooks.install(Settings(name, **settings))

    with synthetic.architecture("tiny"):
        yield launch
    hooks.uninstall()
    assert [dict(vars(cls)) for cls in classes] == before


@pytest.fixture
def loaded(launched, saved):
    """``loaded(family)``: a model by ``from_local`` under the launcher; all are reverted afterwards."""
    found = []

    def load(family="english", cls=None, **options):
        found.append((cls or model_class(family)).from_local(saved(family), "cpu", **options))
        return found[-1]

    yield load
    for model in found:
        turbo.revert(model)


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("chatterbox-turbo: ")]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "nano"])
def test_a_model_is_optimized_as_it_is_loaded(launched, loaded, saved, capsys, family):
    theirs = upstreams(family, saved(family))
    cls = model_class(family)  # taken before
    launched()
    again = getattr(importlib.import_module(cls.__module__), cls.__name__)
    assert again is cls
    model = loaded(family, again)
    assert type(model) is cls and model.turbo.config.preset == "exact"
    assert_equal(theirs, turbo.revert(model))
    assert said(capsys) == []


def test_both_loaders_and_each_call_give_models_of_their_own(launched, loaded, saved, monkeypatch, tmp_path, capsys):
    folder = in_cache(monkeypatch, tmp_path, saved("english"), "ResembleAI/chatterbox")
    theirs, cls = upstreams("english", folder), model_class("english")
    launched()
    given = [
        cls.from_pretrained("cpu"),
        cls.from_pretrained(device=torch.device("cpu")),
        cls.from_local(ckpt_dir=str(folder), device="cpu"),
        loaded(),
    ]
    assert len({id(model.turbo) for model in given}) == 4
    assert given[1].device == torch.device("cpu") and isinstance(given[1].device, torch.device)  # as it was asked for
    turbo.revert(given[1]).device = "cpu"
    for model in (given[1], given[2]):
        assert_equal(theirs, turbo.revert(model))
    one, other = speak(given[0], seed=4), speak(given[3], seed=4)
    assert torch.equal(one, other) and torch.equal(one, speak(theirs, seed=4))
    turbo.revert(given[0])
    assert said(capsys) == []


def test_subclasses_keep_their_kind_and_their_loaders_run_once(launched, loaded, saved, capsys):
    calls = []

    class Plain(model_class("english")):
        pass

    class Own(model_class("english")):
        @classmethod
        def from_local(cls, ckpt_dir, device, mark=None):
            calls.append(mark)
            model = super().from_local(ckpt_dir, device)
            model.mark = mark
            return model

    theirs = upstreams("english", saved("english"))
    launched()
    assert type(loaded(cls=Plain)) is Plain and hasattr(loaded(cls=Plain), "turbo")
    model = loaded(cls=Own, mark="mine")
    assert type(model) is Own and model.mark == "mine" and calls == ["mine"] and hasattr(model, "turbo")
    turbo.revert(model)
    assert differences(theirs.t3, model.t3) == []
    assert said(capsys) == []


def fails(call) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        call()
    assert caught.value.__context__ is None
    return type(caught.value), str(caught.value)


def test_what_upstreams_loader_raises_comes_as_without(launched, tmp_path, saved, capsys):
    cls = model_class("english")
    calls = [
        lambda: cls.from_local(tmp_path / "nowhere", "cpu"),
        lambda: cls.from_local(saved("english")),
        lambda: cls.from_local(saved("english"), "cpu", nana=True),
        lambda: cls.from_local(saved("english"), "warp"),
        lambda: cls.from_pretrained(nana=True),
        lambda: cls.from_local(None, "cpu"),
    ]
    without = [fails(call) for call in calls]
    launched()
    assert [fails(call) for call in calls] == without
    assert said(capsys) == []


def test_models_are_loaded_in_threads_let_go_and_loaded_again(launched, loaded, saved, tmp_path):
    launched(report=str(tmp_path / "reports.jsonl"))
    cls, found = model_class("english"), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(cls.from_local(saved("english"), "cpu")))
        thread.start()
        thread.join()
        model = found.pop()
        assert hasattr(model, "turbo") and speak(model).shape[-1] > 0
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
    voice = loaded("vc")
    lines = [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text().splitlines()]
    assert [line["family"] for line in lines] == ["english", "english", "vc"]
    first = lines[0]
    assert first["class"] == "chatterbox.tts.ChatterboxTTS" and first["pid"] == os.getpid() and first["time"]
    assert first["config"]["preset"] == "exact"
    steps = {step["name"]: step["status"] for step in lines[2]["passes"]}
    assert steps == {step.name: step.status for step in voice.turbo.plan.steps}


class Silent:
    """What some servers put in place of PerTh."""

    def apply_watermark(self, wav, sample_rate, **options):
        return wav


def watermarker(model):
    model.watermarker = Silent()


def voice_of_another(model):
    model.prepare_conditionals(str(synthetic.reference_voice()), exaggeration=0.8)
    kept, model.conds = model.conds, None
    model.conds = kept


def bfloat16(model):
    model.t3 = model.t3.bfloat16()
    model.conds.t3 = model.conds.t3.to(dtype=torch.bfloat16)


def nothing(model):
    pass


def inside():
    return torch.autocast("cpu", torch.bfloat16, enabled=True)


# what is done to the model, what is around generate, and around upstream's, which fails in autocast
AFTER_LOADING = {
    "nothing": (nothing, nullcontext, nullcontext),
    "bfloat16": (bfloat16, nullcontext, nullcontext),
    "autocast": (nothing, inside, nullcontext),
    "autocast that is off": (nothing, lambda: torch.autocast("cpu", enabled=False), nullcontext),
    "inference mode": (nothing, torch.inference_mode, torch.inference_mode),
    "a voice that was kept": (voice_of_another, torch.inference_mode, nullcontext),
    "a watermarker that does nothing": (watermarker, nullcontext, nullcontext),
}


@pytest.fixture(scope="module")
def unlaunched(saved):
    """A model that upstream has loaded itself, for each name one."""
    return lambda: upstreams("english", saved("english"))


@pytest.mark.parametrize("name", AFTER_LOADING)
def test_what_servers_do_after_loading_gives_the_samples_that_it_gives_without(launched, loaded, unlaunched, name):
    change, around, around_upstream = AFTER_LOADING[name]
    theirs = unlaunched()
    launched()
    ours = loaded()
    marked = {}
    for model in (theirs, ours):
        change(model)
        with around() if model is ours else around_upstream():
            marked[model] = [speak(model, seed=seed) for seed in (3, 4)]
    if name == "a watermarker that does nothing":  # the guard marks what would leave without
        assert not torch.equal(marked[ours][0], marked[theirs][0])
        theirs.watermarker = perth.PerthImplicitWatermarker()
        marked[theirs] = [speak(theirs, seed=seed) for seed in (3, 4)]
    for one, other in zip(marked[ours], marked[theirs], strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float32


def test_a_configuration_that_cannot_run_leaves_the_model_as_it_was(launched, loaded, saved, tmp_path, capsys):
    (tmp_path / "demanding.toml").write_text('preset = "exact"\nalignment = { enabled = true }\n')
    theirs = upstreams("english", saved("english"))
    launched("demanding.toml", report=str(tmp_path / "reports.jsonl"))
    for _ in range(2):
        assert_equal(theirs, loaded())
    (line,) = said(capsys)
    assert "ChatterboxTTS is not optimized" in line and "alignment" in line
    assert line.endswith("The program runs without.")
    assert not (tmp_path / "reports.jsonl").exists()
    hooks.uninstall()
    launched("demanding.toml", strict=True)
    with pytest.raises(SystemExit) as ended:
        loaded()
    assert ended.value.code == 1 and "as --strict asks for" in said(capsys)[0]


@pytest.mark.parametrize("config", ["nothere.toml", "fasst"])
def test_a_wrong_configuration_is_told_once_and_the_classes_stay(launched, loaded, saved, capsys, config):
    cls = model_class("english")
    before = dict(vars(cls))
    launched(config)
    assert dict(vars(cls)) == before
    assert not hasattr(loaded(), "turbo")
    (line,) = said(capsys)
    assert config in line and ("No such file" if "." in config else "Unknown preset") in line
    hooks.uninstall()
    with pytest.raises(SystemExit):
        launched(config, strict=True)


def test_a_loader_that_this_package_cannot_follow_is_told_and_the_model_optimized(
    launched, loaded, saved, monkeypatch, capsys
):
    cls = model_class("english")

    def refuses(*args, **kwargs):
        raise OSError("no mapped files here")

    launched()
    monkeypatch.setattr("chatterbox_turbo.upstream.rebinding.MappedFiles", refuses)
    model = loaded()
    assert model.turbo.config.preset == "exact" and type(model) is cls
    (line,) = said(capsys)
    assert "loaded by upstream's own from_local" in line and "no mapped files here" in line


def test_upstreams_own_stays_upstreams_for_comparisons(launched, saved):
    launched()
    assert not hasattr(load_own("english", "cpu", saved("english")), "turbo")
    assert not hasattr(synthetic.build("english", "tiny"), "turbo")


def test_a_wrapper_of_somebody_else_stays_where_it_is_and_works(launched, loaded, saved, monkeypatch):
    cls, calls = model_class("english"), []
    before = vars(cls)["from_local"]
    launched()
    inner = cls.from_local

    def wrapper(cls, *args, **kwargs):
        calls.append(args)
        return inner(*args, **kwargs)

    monkeypatch.setattr(cls, "from_local", classmethod(wrapper))
    assert hasattr(loaded(), "turbo") and len(calls) == 1
    hooks.uninstall()
    assert vars(cls)["from_local"].__func__ is wrapper
    assert not hasattr(loaded(), "turbo") and len(calls) == 2  # what is below it does nothing any more
    monkeypatch.setattr(cls, "from_local", before)


def test_hooks_are_put_once_and_taken_back(launched):
    cls = model_class("english")
    launched()
    wrappers = [vars(cls)[name] for name in LOADERS]
    launched("auto")  # both ways in at once: the first stands
    for module in ("chatterbox.tts", "chatterbox.vc"):
        hooks._imported(importlib.import_module(module))
    assert [vars(cls)[name] for name in LOADERS] == wrappers
    assert all(wrapper.__wrapped__ for wrapper in wrappers) and cls.from_local.__doc__ is None


def test_a_report_that_cannot_be_written_is_told_and_the_model_optimized(launched, loaded, tmp_path, capsys):
    launched(report=str(tmp_path / "nowhere" / "reports.jsonl"))
    assert hasattr(loaded(), "turbo") and hasattr(loaded(), "turbo")
    (line,) = said(capsys)
    assert "nowhere/reports.jsonl: No such file or directory." in line
