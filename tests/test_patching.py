"""The journal: every kind of write on every kind of owner, undone in reverse, nothing copied into instances."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chatterbox_turbo.errors import ForeignPatchError, TurboError
from chatterbox_turbo.patching import Journal


class Thing:
    inherited = "class"

    def method(self, x):
        """Double it."""
        return 2 * x


def test_an_attribute_of_the_class_is_deleted_from_the_instance_not_copied():
    thing, journal = Thing(), Journal()
    journal.set(thing, "inherited", "instance")
    journal.wrap(thing, "method", lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs) + 1)
    assert (thing.inherited, thing.method(3)) == ("instance", 7)
    assert thing.method.__doc__ == "Double it."
    journal.undo()
    assert vars(thing) == {}
    Thing.inherited = "changed"
    assert thing.inherited == "changed"
    Thing.inherited = "class"


def test_an_attribute_of_the_instance_comes_back_in_its_place():
    thing = Thing()
    thing.a, thing.b = 1, 2
    journal = Journal()
    journal.set(thing, "a", 10)
    journal.set(thing, "a", 100)
    journal.set(thing, "c", 3)
    journal.undo()
    assert list(vars(thing).items()) == [("a", 1), ("b", 2)]


def test_parameters_buffers_and_submodules_come_back():
    module = nn.Linear(2, 2)
    module.register_buffer("scale", torch.ones(1))
    module.child = nn.ReLU()
    before = {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")}
    journal = Journal()
    journal.set(module, "weight", nn.Parameter(torch.zeros(2, 2)))
    journal.set(module, "scale", torch.zeros(1))
    journal.set(module, "child", nn.GELU())
    journal.set(module, "extra", nn.Identity())
    assert list(module.state_dict()) == ["weight", "bias", "scale"]
    journal.undo()
    for name, table in before.items():
        assert all(vars(module)[name][key] is value for key, value in table.items())
        assert list(vars(module)[name]) == list(table)


def test_undo_runs_backwards_and_goes_on_after_a_failure():
    order, journal = [], Journal()
    journal.record("first", lambda: order.append("first"))
    journal.record("broken", lambda: 1 / 0)
    journal.record("last", lambda: order.append("last"))
    assert list(journal) == ["first", "broken", "last"]
    with pytest.raises(TurboError, match="broken"):
        journal.undo()
    assert order == ["last", "first"] and len(journal) == 0


def test_a_patch_on_top_stops_undo_before_anything_is_undone():
    thing, journal = Thing(), Journal()
    journal.set(thing, "a", 1)
    journal.set(thing, "b", 2)
    thing.a = 5
    with pytest.raises(ForeignPatchError, match=r"Thing\.a"):
        journal.undo()
    assert (thing.a, thing.b) == (5, 2)
    assert not journal.owns(thing, "a") and journal.owns(thing, "b")


def test_a_deleted_patch_counts_as_foreign():
    thing, journal = Thing(), Journal()
    journal.set(thing, "a", 1)
    del thing.a
    with pytest.raises(ForeignPatchError):
        journal.undo()


def test_what_cannot_be_patched_is_refused_with_a_reason():
    class Slotted:
        __slots__ = ("a",)

    with pytest.raises(TurboError, match="no instance dictionary"):
        Journal().set(Slotted(), "a", 1)
    with pytest.raises(TurboError, match="missing or not callable"):
        Journal().wrap(Thing(), "nothing", lambda *a: None)
