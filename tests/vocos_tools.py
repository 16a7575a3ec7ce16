"""What the tests of Vocos share: a small network, its checkpoint, and a configuration with it.

Fixtures are taken by name: ``network = vocos_tools.network``; ``config`` needs ``checkpoint``, and that ``network``.
"""

from __future__ import annotations

import json

import pytest
import torch

from chatterbox_turbo.runtime.s3gen.vocos_checkpoint import NAME, write
from chatterbox_turbo.runtime.s3gen.vocos_network import MelDescription, VocosArchitecture, build

MEL = MelDescription(24000, 80, 480, 1920, 1920, 0.0, 8000.0)
SMALL = VocosArchitecture(dim=32, intermediate_dim=48, layers=2)
LIMIT = 0.99


def altered(folder, change):
    """The folder with another description."""
    path = folder / NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def loud(architecture=SMALL, seed=7):
    """A network whose blocks count: initial weights of the package are small, and its layers scaled down."""
    torch.manual_seed(seed)
    network = build(architecture, MEL).eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=(weight[0].numel()) ** -0.5)
        elif name.endswith("gamma"):
            weight.fill_(0.5)
        elif not name.endswith("norm.weight"):
            weight.normal_(std=0.1)
    return network


def frames(count, seed=0, rows=1):
    return torch.randn(rows, 80, count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    return loud()


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocos") / "vocoder"
    write(folder, network, {"log-mel distance": 0.25}, {})
    return folder


@pytest.fixture(scope="module")
def config(checkpoint):
    return settings(checkpoint)


def settings(folder, **more):
    vocoder = {"enabled": True, "kind": "vocos", "checkpoint": str(folder), **more.pop("vocoder", {})}
    return {"fidelity": "lossy", "decoding": {"progress": "off"}, "vocoder": vocoder, **more}
