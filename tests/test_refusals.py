"""Demands that cannot be met, and other people's patches: skipped with the reason, or refused beforehand."""

from __future__ import annotations

import pytest
from cases import speak
from snapshots import difference, snapshot

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import ForeignPatchError, InvalidConfigError, PassConflictError, UnavailablePassError

QUIET = {"decoding": {"progress": "off"}}


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
        running = english.turbo.plan.running
        assert "watermark" in running and "decoding" not in running
        speak(english)
    finally:
        turbo.revert(english)
        del english.t3.inference


def test_revert_refuses_while_somebody_patched_on_top(english):
    """On top of what is no method: see ``test_foreign_patches`` for those."""
    turbo.apply(english, QUIET)
    ours = english.s3gen.mel_extractor
    english.s3gen.mel_extractor = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ForeignPatchError, match="Remove that patch first"):
        turbo.revert(english)
    assert english.turbo.plan.running, "half of it was reverted"
    english.s3gen.mel_extractor = ours
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


@pytest.mark.parametrize("name", ["copy", "json", "fidelity"])
def test_a_pass_from_outside_may_be_called_as_something_of_a_configuration(english, name):
    named = type("Named", (Loud,), {"name": name})()
    turbo.apply(english, QUIET, passes=[named])
    assert english.loudness == 11 and english.turbo.plan.running[-1] == name


def test_conflicting_passes_and_double_names_are_refused(english):
    with pytest.raises(PassConflictError, match="conflicts with loud"):
        turbo.apply(english, passes=[Loud(), Silent()])
    with pytest.raises(InvalidConfigError, match="used twice"):
        turbo.apply(english, passes=[Loud(), Loud()])


@pytest.mark.parametrize("attribute", ["patch_points", "replaces"])
def test_a_pass_that_names_an_unknown_patch_point_is_refused(english, attribute):
    class Misspelt(Loud):
        patch_points = ("s3gen.inference", "t3.inference_turbo")  # the second is another family's

    assert "loud" in turbo.inspect(english, passes=[Misspelt()]).running
    setattr(Misspelt, attribute, ("s3gen.infer",))
    before = snapshot(english)
    with pytest.raises(InvalidConfigError, match=r"'loud' names the patch point 's3gen\.infer'.*s3gen\.inference"):
        turbo.apply(english, passes=[Misspelt()])
    assert difference(before, snapshot(english)) == []


def test_a_pass_above_the_ceiling_is_refused(english):
    class Sloppy(Loud):
        name = "sloppy"

        def fidelity(self, context):
            return "lossy"

    with pytest.raises(InvalidConfigError, match=r'sloppy.*lossy, above the ceiling fidelity = "numerical"'):
        turbo.apply(english, passes=[Sloppy()])
    turbo.apply(english, {"fidelity": "lossy"}, passes=[Sloppy()])
    assert english.turbo.plan.step("sloppy").fidelity == "lossy"
