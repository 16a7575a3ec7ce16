"""`load` on classes whose `from_pretrained` and `from_local` an app or a launcher has wrapped."""

from __future__ import annotations

import functools
import warnings

import pytest
import wrapt
from loading_tools import assert_equal, in_cache, upstreams

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import ForeignPatchError, InvalidRequestError, SlowLoadingWarning
from chatterbox_turbo.upstream.loading import model_class

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


@pytest.fixture
def cached(saved, monkeypatch, tmp_path):
    """A cache with the English checkpoint, and no network; the checkpoint's folder."""
    return in_cache(monkeypatch, tmp_path, saved("english"), "ResembleAI/chatterbox")


def by_function(original, wrapper):
    return classmethod(functools.wraps(original.__func__)(wrapper))


def by_method(original, wrapper):
    return classmethod(functools.wraps(original)(wrapper))


def without_class(original, wrapper):
    cls = original.__self__
    return staticmethod(functools.wraps(original)(lambda *args, **kwargs: wrapper(cls, *args, **kwargs)))


def by_wrapt(original, wrapper):
    def call(wrapped, instance, args, kwargs):
        return wrapper(instance, *args, **kwargs)

    return wrapt.FunctionWrapper(vars(original.__self__)[original.__name__], call)


def twice(original, wrapper):
    return by_wrapt(
        original, lambda cls, *args, **kwargs: by_function(original, wrapper).__func__(cls, *args, **kwargs)
    )


NAMING = [by_function, by_method, without_class, by_wrapt, twice]


def launch(monkeypatch, wrap):
    """Both loaders of the English class go through ``load``, as a launcher would have it; the calls that came."""
    cls, calls = model_class("english"), []

    def from_pretrained(cls, device):
        calls.append("from_pretrained")
        return turbo.load(cls, device, "exact")

    def from_local(cls, ckpt_dir, device):
        calls.append("from_local")
        return turbo.load(cls, device, "exact", folder=ckpt_dir)

    for wrapper in (from_pretrained, from_local):
        monkeypatch.setattr(cls, wrapper.__name__, wrap(getattr(cls, wrapper.__name__), wrapper))
    return cls, calls


@pytest.fixture
def no_slow_loading():
    with synthetic.architecture("tiny"), warnings.catch_warnings():
        warnings.simplefilter("error", SlowLoadingWarning)
        yield


@pytest.mark.usefixtures("no_slow_loading")
@pytest.mark.parametrize("wrap", NAMING)
def test_a_launcher_loads_through_the_original(cached, monkeypatch, wrap):
    theirs = upstreams("english", cached)
    cls, calls = launch(monkeypatch, wrap)
    for load in (lambda: cls.from_pretrained("cpu"), lambda: cls.from_local(cached, device="cpu")):
        model = load()
        assert model.turbo.config.preset == "exact" and type(model) is cls
        assert_equal(theirs, turbo.revert(model))
    assert calls == ["from_pretrained", "from_local"]  # each once: what load runs is not the wrapper


@pytest.mark.usefixtures("no_slow_loading")
def test_a_subclass_of_a_wrapped_class_keeps_its_kind(cached, monkeypatch):
    cls, _ = launch(monkeypatch, by_function)

    class Mine(cls):
        pass

    assert type(Mine.from_pretrained("cpu")) is Mine


@pytest.mark.usefixtures("no_slow_loading")
def test_a_wrapper_may_find_the_folder_itself(cached, monkeypatch):
    """No recursion: what it wraps is not asked for."""
    cls = model_class("english")
    monkeypatch.setattr(cls, "from_pretrained", classmethod(lambda cls, device: turbo.load(cls, device, folder=cached)))
    model = turbo.load("english", "cpu", optimize=False)
    assert type(model) is cls and hasattr(model, "turbo")
    turbo.revert(model)


@pytest.mark.usefixtures("no_slow_loading")
def test_a_subclass_that_loads_its_base_is_no_recursion(cached):
    class Mine(model_class("english")):
        @classmethod
        def from_local(cls, ckpt_dir, device):
            return turbo.load("english", device, folder=ckpt_dir, optimize=False)

    assert_equal(upstreams("english", cached), turbo.load(Mine, "cpu", folder=cached, optimize=False))


@pytest.mark.parametrize("kind", ["from_pretrained", "from_local"])
def test_a_wrapper_that_hides_the_original_is_told_instead_of_recursion(cached, monkeypatch, kind):
    cls, calls = launch(monkeypatch, lambda original, wrapper: classmethod(wrapper))
    with synthetic.architecture("tiny"), pytest.raises(ForeignPatchError) as caught:
        cls.from_pretrained("cpu") if kind == "from_pretrained" else cls.from_local(cached, "cpu")
    assert len(calls) == 2
    message = str(caught.value)
    assert f"ChatterboxTTS.{kind}" in message and "functools.wraps" in message and "hub" not in message


@pytest.mark.parametrize("kind", ["from_pretrained", "from_local"])
def test_what_a_hidden_original_loads_is_told_to_be_slow_and_loaded_once(cached, monkeypatch, kind):
    cls, loaded = model_class("english"), []

    def hide(name):
        original = getattr(cls, name)

        def wrapper(cls, *args, **kwargs):
            loaded.append(original(*args, **kwargs))
            return loaded[-1]

        monkeypatch.setattr(cls, name, classmethod(wrapper))

    hide(kind)
    folder = cached if kind == "from_local" else None
    with synthetic.architecture("tiny"), pytest.warns(SlowLoadingWarning, match=rf"{kind}.*__wrapped__"):
        model = turbo.load(cls, "cpu", folder=folder, optimize=False)
    assert loaded == [model]


def test_options_are_those_of_the_original(saved, monkeypatch):
    cls = model_class("english")
    original = cls.from_local

    def any_of_them():
        return lambda cls, *args, **kwargs: original(*args, **kwargs)

    monkeypatch.setattr(cls, "from_local", by_method(original, any_of_them()))
    with pytest.raises(InvalidRequestError, match=r"no option nana.*Options of its loader: none"):
        turbo.load(cls, "cpu", folder=saved("english"), nana=True)
    monkeypatch.setattr(cls, "from_local", classmethod(any_of_them()))  # takes what may come: the original decides
    with pytest.raises(turbo.TurboError, match=r"unexpected keyword argument 'nana'"):
        turbo.load(cls, "cpu", folder=saved("english"), nana=True)
