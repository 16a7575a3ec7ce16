"""Combinations of versions, read from a file, and an environment for one of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import tomlkit

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = HERE / "combinations.toml"
AXES = ("chatterbox", "transformers", "torch", "python")
SOURCE = "CHATTERBOX_SOURCE"  # the variable with the path of a checkout of chatterbox
# Upstream's demos need gradio and nothing here does; pkuseg, of 0.1.4 alone and for Chinese alone, builds nowhere new.
UNUSED = ("gradio", "pkuseg")
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist")


class NotBuilt(Exception):
    """An environment that cannot be had; the text is for the table."""


@dataclass(frozen=True)
class Combination:
    """Versions that belong together: numbers, ``newest`` or requirements (``<2.15``); ``chatterbox`` also ``source``.

    Empty: what upstream asks for (``numpy``), the version of torch (``torchaudio``). ``without`` is a folder that is
    taken out of the installed packages, and ``remark`` says why.
    """

    name: str
    python: str
    chatterbox: str
    transformers: str
    torch: str
    torchaudio: str = ""
    numpy: str = ""
    without: str = ""
    remark: str = ""

    @property
    def folder(self) -> str:
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in self.name).split())

    def requirements(self, upstreams: Iterable[str]) -> list[str]:
        """Upstream's own requirements, with the versions of this combination in the place of its exact ones."""
        chosen = {
            "torch": self.torch,
            "torchaudio": self.torchaudio or (self.torch if self.torch[0].isdigit() else "newest"),
            "transformers": self.transformers,
            "numpy": self.numpy,
            "safetensors": "newest" if self.transformers == "newest" else "",
            "resemble-perth": "1.0.1",  # the development branch asks for a repository
        }
        taken = {name: name + specifier(version) for name, version in chosen.items() if version}
        kept = [line for line in upstreams if _name(line) not in taken and _name(line) not in UNUSED]
        return [*kept, *taken.values()]


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def specifier(version: str) -> str:
    """A version as requirements write it: ``2.6.0`` is ``==2.6.0``, ``newest`` is nothing."""
    return "" if version == "newest" else f"=={version}" if version[0].isdigit() else version


def read(path: Path = TABLE) -> tuple[list[Combination], list[dict[str, str]], dict[str, str]]:
    """Combinations, what cannot be had (``versions``, ``reason``, ``way``), and the chosen tests by file."""
    table = tomlkit.parse(path.read_text()).unwrap()
    return [Combination(**each) for each in table["combination"]], table.get("refused", []), table["tests"]


def interpreter(version: str, environment: Mapping[str, str] = os.environ) -> str:
    """The path of a Python: from the folders of ``PYTHONS``, then from ``PATH``.

    Raises:
        NotBuilt: there is none.
    """
    folders = os.pathsep.join(environment.get(name, "") for name in ("PYTHONS", "PATH"))
    found = shutil.which(f"python{version}", path=folders)
    if found is None:
        raise NotBuilt(f"no python{version} on PATH or in the folders of PYTHONS")
    return found


def build(combination: Combination, folder: Path, uv: str) -> Path:
    """Installs a combination with this project, as it stands, into a new environment; returns its Python.

    Raises:
        NotBuilt: with the last that the installer said.
    """
    source = os.environ.get(SOURCE, "") if combination.chatterbox == "source" else ""
    if combination.chatterbox == "source" and not source:
        raise NotBuilt(f"no checkout: {SOURCE} is not set")
    python = interpreter(combination.python)
    _said([uv, "venv", "--quiet", "--clear", "--no-project", "--python", python, str(folder)], folder)
    upstream = source or f"chatterbox-tts{specifier(combination.chatterbox)}"
    # without its requirements, and this project without it: an override of NumPy would hold for every package
    _said([uv, "pip", "install", "--quiet", "--no-deps", upstream], folder)
    installed = folder / "bin" / "python"
    asked = "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('chatterbox-tts')))"
    requirements = combination.requirements(json.loads(_said([str(installed), "-c", asked], folder)))
    override = folder / "override.txt"
    override.write_text("chatterbox-tts; python_version < '3'\n")
    own = ["--override", str(override), "--editable", str(ROOT)]
    _said([uv, "pip", "install", "--quiet", *own, *requirements, *TOOLS], folder)
    if combination.without:
        for packages in folder.glob("lib/python*/site-packages"):
            shutil.rmtree(packages / combination.without)
    return installed


def _said(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VIRTUAL_ENV": str(folder)})
    if done.returncode:
        raise NotBuilt(done.stderr.strip()[-800:])
    return done.stdout
