"""Every place inside chatterbox-tts that this package writes to or builds on, and the shape it must have.

A patch point is checked in three respects: it exists, its parameters are there, and, where this package
*replaces* the code, the code is one whose behaviour it reproduces (``code``, a digest of the syntax tree that
ignores comments, layout, messages and docstrings). A fork or a new release that changes one of them is told
apart here, before anything is touched.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import wrapt

from ..patching import Journal
from .families import Parts

LLAMA = ("english", "multilingual")
GPT2 = ("turbo", "nano")
SPEAKING = (*LLAMA, *GPT2)
ALL = (*SPEAKING, "vc")


@dataclass(frozen=True)
class PatchPoint:
    """A method by its dotted path from the model, what it must accept, and for which families it exists.

    A parameter that releases call differently is a tuple of its names.
    """

    path: str
    families: tuple[str, ...]
    parameters: tuple[str | tuple[str, ...], ...]
    package: str = "chatterbox"
    code: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Finding:
    """What a check of one patch point found; ``problem`` is empty where it fits.

    ``forceable``: the shape fits and only the code is unknown, so that a user who knows better may go on.
    """

    path: str
    problem: str = ""
    forceable: bool = False
    foreign: bool = False


_POINTS = (
    PatchPoint(
        "generate",
        LLAMA,
        ("text", "audio_prompt_path", "exaggeration", "cfg_weight", "temperature"),
        # English; Multilingual up to 0.1.7, and of the development branch
        code=frozenset({"3a0c01ba9bc3", "b38d9c315079", "fedd296dec44"}),
    ),
    PatchPoint(
        "generate",
        GPT2,
        ("text", "audio_prompt_path", "temperature", "top_k", "top_p"),
        code=frozenset({"df26b53b8710"}),  # 0.1.6 to the development branch
    ),
    PatchPoint("generate", ("vc",), ("audio", "target_voice_path"), code=frozenset({"4ea2480b7f30"})),
    PatchPoint(
        "prepare_conditionals",
        SPEAKING,
        ("wav_fpath", "exaggeration"),
        # English, Multilingual and GPT-2; 0.1.4 to the development branch
        code=frozenset({"f0a8204f46c2", "aafec764b4f1", "d2fc64aa0f6c"}),
    ),
    PatchPoint("set_target_voice", ("vc",), ("wav_fpath",), code=frozenset({"a609a9dbcfaa"})),
    PatchPoint("ve.embeds_from_wavs", SPEAKING, ("wavs", "sample_rate"), code=frozenset({"706fb1305733"})),
    PatchPoint("ve.embeds_from_mels", SPEAKING, ("mels", "mel_lens"), code=frozenset({"49573f87e6b1"})),
    PatchPoint("ve.inference", SPEAKING, ("mels", "mel_lens"), code=frozenset({"02cd5dd2ef75"})),
    PatchPoint(
        "t3.inference",
        LLAMA,
        (
            "t3_cond",
            "text_tokens",
            "max_new_tokens",
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "cfg_weight",
        ),
        code=frozenset({"51592b433be4", "8bc4108c2195"}),  # 0.1.4 to 0.1.7; development branch without analyzer
    ),
    PatchPoint(
        "t3.inference_turbo",
        GPT2,
        ("t3_cond", "text_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "max_gen_len"),
        code=frozenset({"6a6e12363483"}),  # 0.1.6 to the development branch
    ),
    PatchPoint("t3.prepare_input_embeds", SPEAKING, ("t3_cond", "text_tokens", "speech_tokens", "cfg_weight")),
    PatchPoint(
        "t3.tfmr.forward",
        SPEAKING,
        ("inputs_embeds", ("past_key_values", "cache"), "use_cache"),  # cache: Transformers 5.24
        package="transformers",
    ),
    PatchPoint(
        "s3gen.flow.inference",
        ALL,
        ("token", "token_len", "prompt_token", "prompt_feat", "embedding", "finalize"),
        code=frozenset({"6b1c61b63b7a", "16f51cb0aa24"}),  # 0.1.4 and 0.1.5; 0.1.6 to the development branch
    ),
    PatchPoint(
        "s3gen.flow.decoder.forward",
        ALL,
        ("mu", "mask", "n_timesteps", "spks", "cond"),
        code=frozenset({"cebb810d8469", "e1e9ca9bbf8b"}),  # as above
    ),
    PatchPoint(
        "s3gen.flow.decoder.solve_euler",
        (*LLAMA, "vc"),
        ("x", "t_span", "mu", "mask", "spks", "cond"),
        code=frozenset({"b17d58664cf1", "c888120dd31b"}),  # 0.1.4 and 0.1.5; 0.1.6 to the development branch
    ),
    PatchPoint(
        "s3gen.flow.decoder.basic_euler",
        GPT2,
        ("x", "t_span", "mu", "mask", "spks", "cond"),
        code=frozenset({"1eb143e06e94"}),  # 0.1.6 to the development branch
    ),
    PatchPoint(
        "s3gen.flow.decoder.estimator.forward",
        ALL,
        ("x", "mask", "mu", "t", "spks", "cond"),
        code=frozenset({"d4ea56d3ccd4", "7eb0c29e88a5"}),  # 0.1.4 and 0.1.5; 0.1.6 to the development branch
    ),
    PatchPoint(
        "s3gen.flow.encoder.forward",
        ALL,
        ("xs", "xs_lens"),
        code=frozenset({"d797fcecd85d"}),  # 0.1.4 to the development branch
    ),
    PatchPoint("s3gen.embed_ref", ALL, ("ref_wav", "ref_sr", "device")),
    PatchPoint("s3gen.tokenizer.forward", ALL, ("wavs", "max_len")),
    # of each of these three, 0.1.4 and 0.1.5; 0.1.6 to the development branch
    PatchPoint(
        "s3gen.flow_inference", ALL, ("speech_tokens", "ref_dict"), code=frozenset({"22c7373a70fe", "e359cf512887"})
    ),
    PatchPoint(
        "s3gen.mel2wav.inference",
        ALL,
        ("speech_feat", "cache_source"),
        code=frozenset({"57198f557428"}),  # 0.1.4 to the development branch, as the two below
    ),
    PatchPoint("s3gen.mel2wav.decode", ALL, ("x", "s"), code=frozenset({"9ecd7534854d"})),
    PatchPoint("s3gen.mel2wav.m_source.l_sin_gen.forward", ALL, ("f0",), code=frozenset({"32ac3e72aa40"})),
    PatchPoint("s3gen.hift_inference", ALL, ("speech_feat",), code=frozenset({"f5fe420703b5", "312754297b6a"})),
    PatchPoint("s3gen.inference", ALL, ("speech_tokens", "ref_dict"), code=frozenset({"982c6304f0a4", "cf0d51d93e88"})),
    PatchPoint(
        "watermarker.apply_watermark",
        ALL,
        ("signal", "sample_rate"),
        package="perth",
        code=frozenset({"540002ff2d06"}),  # 1.0.1
    ),
    PatchPoint("watermarker.get_watermark", ALL, ("wm_signal", "sample_rate"), package="perth"),
)


def patch_points(family: str) -> dict[str, PatchPoint]:
    """The patch points of a family by path."""
    return {point.path: point for point in _POINTS if family in point.families}


def owner_of(parts: Parts, path: str) -> tuple[Any, str]:
    """The object that the last name of a dotted path is looked up on, and that name.

    Raises:
        AttributeError: a name on the way is missing; the message has the path.
    """
    *way, name = path.split(".")
    owner = parts.model
    for step in way:
        owner = getattr(owner, step, None)
        if owner is None:
            raise AttributeError(f"the model has no {'.'.join(way)}")
    while isinstance(owner, wrapt.ObjectProxy):  # an observed watermarker: look at the real one
        owner = owner.__wrapped__
    return owner, name


def check(parts: Parts, point: PatchPoint, journal: Journal | None = None) -> Finding:
    """Whether a patch point has the shape that it must have; ``journal`` tells own patches from foreign ones."""
    try:
        owner, name = owner_of(parts, point.path)
    except AttributeError as error:
        return Finding(point.path, str(error))
    original = inspect.getattr_static(type(owner), name, None)
    if original is None:
        return Finding(point.path, f"{type(owner).__name__} has no method {name}")
    if name in vars(owner) and not (journal is not None and journal.owns(owner, name)):
        problem = f"somebody else has patched {point.path} on this object"
        return Finding(point.path, problem, foreign=True)
    home = getattr(inspect.unwrap(original), "__module__", "") or ""
    if home.split(".")[0] != point.package:
        problem = f"{point.path} comes from {home or 'an unknown module'}, not from {point.package}"
        return Finding(point.path, problem, foreign=True)
    taken = inspect.signature(original).parameters
    names = [(name,) if isinstance(name, str) else name for name in point.parameters]
    missing = [" or ".join(each) for each in names if not any(name in taken for name in each)]
    if missing:
        return Finding(point.path, f"{point.path} no longer takes {', '.join(missing)}")
    if point.code and digest(original) not in point.code:
        problem = f"the code of {point.path} is not one that this package reproduces (digest {digest(original)})"
        return Finding(point.path, problem, forceable=True)
    return Finding(point.path)


def first_problem(parts: Parts, paths: Iterable[str], journal: Journal | None = None) -> str:
    """What is wrong with the first patch point that does not fit, unknown code included; empty where all do."""
    points = patch_points(parts.family)
    findings = (check(parts, points[path], journal) for path in paths)
    return next((finding.problem for finding in findings if finding.problem), "")


def check_all(parts: Parts, journal: Journal | None = None) -> list[Finding]:
    """A finding for every patch point of the model's family."""
    return [check(parts, point, journal) for point in patch_points(parts.family).values()]


@cache
def digest(function: Any) -> str:
    """Twelve hexadecimal digits that change when the statements of a function change.

    Walks the syntax tree and leaves out docstrings, f-strings and calls that only talk (print, logger), so
    that neither comments nor messages nor the version of Python matter. ``unknown`` without a source.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return "unknown"
    words: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.JoinedStr) or _only_talks(node):
            return
        words.append(type(node).__name__)
        for field, value in ast.iter_fields(node):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, ast.AST):
                    visit(item)
                elif field in ("id", "attr", "arg", "name", "value") and item is not None:
                    words.append(repr(item))

    visit(tree)
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]


def _only_talks(node: ast.AST) -> bool:
    if not isinstance(node, ast.Expr):
        return False
    if isinstance(node.value, ast.Constant):
        return True  # a docstring
    function = node.value.func if isinstance(node.value, ast.Call) else None
    return (isinstance(function, ast.Name) and function.id == "print") or (
        isinstance(function, ast.Attribute) and getattr(function.value, "id", "") == "logger"
    )
