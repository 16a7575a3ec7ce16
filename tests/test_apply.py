"""Apply, revert, optimized, inspect: all or nothing, nothing left behind, one model never touches another."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from cases import FAMILIES, difference, request_for, snapshot, speak

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import (
    ForeignPatchError,
    InvalidConfigError,
    PassConflictError,
    UnavailablePassError,
    UnsupportedModelError,
)
from chatterbox_turbo.patching import Journal

QUIET = {"decoding": {"progress": "off"}}
EVERYTHING = {**QUIET, "warmup": {"level": "light"}}


class Injected(Exception):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_failure_in_any_patch_leaves_the_model_pristine(models, monkeypatch, family, when):
    model = models(family)
    speak(model)
    before = snapshot(model)
    verbs = {name: getattr(Journal, name) for name in ("set", "record")}
    failed_at = countdown = 0

    def failing(name):
        def write(self, *args):
            nonlocal countdown
            countdown -= 1
            if countdown == 0 and when == "before":
                raise Injected
            verbs[name](self, *args)
            if countdown == 0:
                raise Injected

        return write

    for name in verbs:
        monkeypatch.setattr(Journal, name, failing(name))
    while True:
        countdown = failed_at + 1
        try:
            turbo.apply(model, EVERYTHING)
        except Injected:
            failed_at += 1
            assert difference(before, snapshot(model)) == [], f"after a fault in write {failed_at}"
        else:
            break
    turbo.revert(model)
    assert failed_at >= 5, "hardly any write was reached"
    assert difference(before, snapshot(model)) == []


def test_a_failing_pass_keeps_the_configuration_before_it(english):
    class Failing(turbo.Pass):
        name = "failing"

        def apply(self, context):
            context.journal.set(context.parts.t3, "marker", 1)
            raise Injected

    turbo.apply(english, {**QUIET, "watermark": {"detect": True}})
    with pytest.raises(Injected):
        turbo.apply(english, "exact", passes=[Failing()])
    assert english.turbo.config.watermark.detect
    assert not hasattr(english.t3, "marker")


def test_revert_of_an_untouched_model_is_a_no_op(english):
    before = snapshot(english)
    assert turbo.revert(english) is english
    assert difference(before, snapshot(english)) == []


def test_apply_returns_the_same_object_and_adds_one_attribute(english):
    names = set(vars(english))
    assert turbo.apply(english) is english
    entry_points = {"generate", "prepare_conditionals"}
    assert set(vars(english)) - names == {"turbo", *entry_points}
    assert english.turbo.revert() is english
    assert set(vars(english)) == names


def test_optimized_reverts_also_after_an_exception(english):
    before = snapshot(english)
    with pytest.raises(Injected), turbo.optimized(english, "exact"):
        assert english.turbo.plan.running
        raise Injected
    assert difference(before, snapshot(english)) == []


def test_optimized_puts_an_earlier_configuration_back(english):
    turbo.apply(english, QUIET)
    with turbo.optimized(english, {"decoding": {"max_new_tokens": 5}}):
        assert english.turbo.config.decoding.max_new_tokens == 5
    assert english.turbo.config.decoding.max_new_tokens is None


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_touches_nothing_and_tells_what_apply_does(models, family):
    model = models(family)
    before = snapshot(model)
    planned = turbo.inspect(model, QUIET)
    assert difference(before, snapshot(model)) == []
    turbo.apply(model, QUIET)
    try:
        assert planned.running == model.turbo.plan.running
        assert turbo.inspect(model, QUIET).running == planned.running, "own patches were taken for foreign ones"
    finally:
        turbo.revert(model)


def test_two_models_are_independent(models, english):
    other = synthetic.build("english", "tiny", seed=1)
    expected = speak(other)
    before = snapshot(other)
    turbo.apply(english, {"decoding": {"max_new_tokens": 3, "progress": "off"}})
    with pytest.warns(turbo.errors.SpeechTruncatedWarning):
        speak(english)
    assert difference(before, snapshot(other)) == []
    assert torch.equal(speak(other), expected)
    turbo.apply(other, QUIET)
    turbo.revert(english)
    assert torch.equal(speak(other), expected)


def test_models_that_share_a_watermarker_are_independent(english):
    other = synthetic.build("english", "tiny", seed=1)
    other.watermarker = english.watermarker
    turbo.apply(english, QUIET)
    turbo.apply(other, QUIET)
    assert "watermark" in other.turbo.plan.running
    turbo.revert(english)
    speak(other)
    assert other.turbo.timings()["watermark"] > 0


def test_a_model_can_be_garbage_collected():
    model = turbo.apply(synthetic.build("english", "tiny", seed=2), QUIET)
    speak(model)
    t3, whole = weakref.ref(model.t3), weakref.ref(model)
    del model
    gc.collect()
    assert whole() is None and t3() is None


def test_generate_keeps_its_signature(english):
    import inspect

    before = inspect.signature(english.generate)
    turbo.apply(english)
    assert inspect.signature(english.generate) == before
    assert english.generate.__doc__ == type(english).generate.__doc__


def test_a_voice_of_the_caller_is_not_written_to(models):
    model = models("turbo")
    given = model.conds.gen
    tensors = {key: (id(value), value.clone()) for key, value in given.items() if torch.is_tensor(value)}
    with turbo.optimized(model, QUIET):
        speak(model)
    assert model.conds.gen is given
    for key, (_, content) in tensors.items():
        assert torch.equal(given[key], content)


def test_objects_that_are_no_model_are_refused():
    with pytest.raises(UnsupportedModelError, match="not a chatterbox model"):
        turbo.apply(object())

    class Wrapper:
        def __init__(self, inner):
            self.inner = inner

    class Inner:
        s3gen = None

    with pytest.raises(UnsupportedModelError, match="'inner' looks like one"):
        turbo.apply(Wrapper(Inner()))


def test_an_optimized_model_refuses_to_be_copied(english):
    turbo.apply(english)
    with pytest.raises(TypeError, match="Revert it first"):
        copy.deepcopy(english.turbo)


def test_report_names_every_pass_and_its_reason(english):
    turbo.apply(english, QUIET)
    speak(english)
    report = english.turbo.report()
    data = report.to_dict()
    assert [entry["name"] for entry in data["passes"]] == [step.name for step in english.turbo.plan.steps]
    assert "does not apply" in english.turbo.plan.step("alignment").reason
    assert set(data["timings"]) == {"t3", "flow", "vocoder", "watermark"}
    assert data["memory_now"]["weights"] == data["memory_before"]["weights"] > 0
    assert "skipped: it does not apply" in str(report)


# -- demands that cannot be met, and other people's patches --------------------------------------------------


def test_a_demanded_pass_that_cannot_run_is_an_error(english):
    before = snapshot(english)
    with pytest.raises(UnavailablePassError, match=r"alignment.*does not apply.*auto"):
        turbo.apply(english, {"alignment": {"enabled": True}})
    assert difference(before, snapshot(english)) == []


def test_a_foreign_patch_is_skipped_or_refused(english):
    english.t3.inference = english.t3.inference
    try:
        assert "somebody else has patched t3.inference" in turbo.inspect(english).step("decoding").reason
        with pytest.raises(ForeignPatchError, match=r"t3\.inference"):
            turbo.apply(english, {"decoding": {"enabled": True}})
        turbo.apply(english)
        assert english.turbo.plan.running == ["watermark"]
        speak(english)
    finally:
        turbo.revert(english)
        del english.t3.inference


def test_revert_refuses_while_somebody_patched_on_top(english):
    turbo.apply(english, QUIET)
    ours = english.generate
    english.generate = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ForeignPatchError, match="Remove that patch first"):
        turbo.revert(english)
    assert english.turbo.plan.running, "half of it was reverted"
    english.generate = ours
    turbo.revert(english)


def test_an_unknown_token_loop_is_skipped_unless_demanded(english, monkeypatch):
    original = type(english.t3).inference

    def inference(self, *, t3_cond, text_tokens, max_new_tokens=None, temperature=0.8, top_p=0.95, min_p=0.05,
                  repetition_penalty=1.2, cfg_weight=0.5):  # fmt: skip
        return original(self, t3_cond=t3_cond, text_tokens=text_tokens, max_new_tokens=max_new_tokens)

    inference.__module__ = original.__module__
    monkeypatch.setattr(type(english.t3), "inference", inference)
    step = turbo.inspect(english).step("decoding")
    assert step.status == "skipped" and "not one that this package reproduces" in step.reason
    turbo.apply(english, {"decoding": {"enabled": True, "progress": "off"}})
    assert english.turbo.plan.step("decoding").status == "on"


def test_a_release_that_lost_a_parameter_is_skipped_with_its_name(english, monkeypatch):
    def inference(self, *, t3_cond, text_tokens):
        raise AssertionError("not called")

    inference.__module__ = type(english.t3).inference.__module__
    monkeypatch.setattr(type(english.t3), "inference", inference)
    assert "no longer takes max_new_tokens, temperature" in turbo.inspect(english).step("decoding").reason
    with pytest.raises(UnavailablePassError, match="no longer takes"):
        turbo.apply(english, {"decoding": {"enabled": True}})


def test_an_attribute_called_turbo_of_somebody_else_is_refused(english):
    english.turbo = "a motor"
    try:
        with pytest.raises(ForeignPatchError, match="'turbo' already"):
            turbo.apply(english)
    finally:
        del english.turbo


class Loud(turbo.Pass):
    name = "loud"

    def apply(self, context):
        context.journal.set(context.parts.model, "loudness", 11)


class Silent(Loud):
    name = "silent"
    conflicts = ("loud",)


def test_a_pass_from_outside_runs_after_the_own_ones(english):
    before = snapshot(english)
    turbo.apply(english, QUIET, passes=[Loud()])
    assert english.loudness == 11 and english.turbo.plan.running[-1] == "loud"
    turbo.revert(english)
    assert difference(before, snapshot(english)) == []


def test_conflicting_passes_and_double_names_are_refused(english):
    with pytest.raises(PassConflictError, match="conflicts with loud"):
        turbo.apply(english, passes=[Loud(), Silent()])
    with pytest.raises(InvalidConfigError, match="used twice"):
        turbo.apply(english, passes=[Loud(), Loud()])


def test_a_pass_above_the_ceiling_is_refused(english):
    class Sloppy(Loud):
        name = "sloppy"

        def fidelity(self, config):
            return "lossy"

    with pytest.raises(InvalidConfigError, match=r'sloppy.*lossy, above the ceiling fidelity = "numerical"'):
        turbo.apply(english, passes=[Sloppy()])
    turbo.apply(english, {"fidelity": "lossy"}, passes=[Sloppy()])
    assert english.turbo.plan.step("sloppy").fidelity == "lossy"


def test_importing_and_applying_change_no_global(english, tmp_path):
    state = (torch.is_grad_enabled(), torch.backends.cudnn.benchmark, torch.get_default_dtype(), torch.get_num_threads())
    rng = torch.random.get_rng_state()
    turbo.apply(english, EVERYTHING)
    assert torch.equal(torch.random.get_rng_state(), rng), "warm-up drew from the caller's generator"
    assert state == (
        torch.is_grad_enabled(),
        torch.backends.cudnn.benchmark,
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )
    assert request_for(english)
