"""What the tests of quantized folders share: such folders of tiny models, made once, and making one.

A fixture is taken by name: ``quantized = quantized_tools.quantized``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cases import require

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic

# tiny models of two blocks have nothing between the ends that the other strategies leave
MADE = {
    "english": {"scheme": "int8", "strategy": "aggressive"},
    "multilingual": {"scheme": "int8", "strategy": "balanced"},
    "turbo": {"scheme": "int4", "strategy": "aggressive", "rounding": "nearest"},
    "nano": {"scheme": "int8", "strategy": "aggressive"},
}
NAME = "chatterbox_turbo.json"


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    """``quantized(family)``: the folder of a tiny quantized checkpoint, written once; for reading only."""
    folders = {}

    def get(family: str) -> Path:
        if family not in folders:
            require(family)
            folder = tmp_path_factory.mktemp("quantized") / family
            with synthetic.architecture("tiny"):
                folders[family] = turbo.quantize(family, folder, saved(family), **MADE[family])
        return folders[family]

    return get


def linked(source, folder):
    """A folder of the same files, for replacing some."""
    return Path(shutil.copytree(source, folder, copy_function=os.link))


def quantize(saved, folder, **options):
    with synthetic.architecture("tiny"):
        return turbo.quantize("english", folder, saved("english"), **{"strategy": "aggressive", **options})
