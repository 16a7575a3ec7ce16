"""Memory of the host: weights in huge pages keep contents and addresses; where there are none, nothing happens."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from chatterbox_turbo import optimized
from chatterbox_turbo.passes import token_model
from chatterbox_turbo.runtime.cpu import host_memory
from chatterbox_turbo.runtime.cpu.host_memory import use_huge_pages
from chatterbox_turbo.upstream import t3_weights

SIZE = 2**21


def in_huge_pages() -> int:
    """Bytes of this process that the system has in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


def collapses() -> bool:
    """Whether this is a Linux that lays pages together when it is asked to."""
    if platform.system() != "Linux" or not host_memory.HUGE_PAGE.exists():
        return False
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2]) >= (6, 1)


@pytest.mark.skipif(not collapses(), reason="needs Linux 6.1 or newer with huge pages")
def test_matrices_are_laid_into_huge_pages():
    before = in_huge_pages()
    matrices = [torch.randn(2048, 4096, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    addresses, copies = [m.data_ptr() for m in matrices], [m.clone() for m in matrices]
    laid = use_huge_pages(matrices)
    assert laid >= 2 * (matrices[0].nbytes - 2 * SIZE)
    assert in_huge_pages() - before >= laid
    assert [m.data_ptr() for m in matrices] == addresses
    assert all(map(torch.equal, matrices, copies))


def test_only_pages_that_are_filled():
    """Neighbours and small gaps count as one; a page that the tensors fill in part is left alone."""
    at = 1000 * SIZE
    ranges = [(at + 5, at + SIZE), (at + SIZE + 4096, at + 2 * SIZE), (at + 4 * SIZE, at + 5 * SIZE - 1)]
    assert list(host_memory._whole_pages(ranges, SIZE)) == [at + SIZE]
    assert list(host_memory._whole_pages([(at, at + 2 * SIZE), (at + SIZE, at + 4 * SIZE)], SIZE)) == [
        at + page * SIZE for page in range(4)
    ]
    assert list(host_memory._whole_pages([], SIZE)) == []


def test_a_system_without_huge_pages(monkeypatch, tmp_path):
    monkeypatch.setattr(host_memory, "HUGE_PAGE", tmp_path / "nothing")
    assert use_huge_pages([torch.zeros(4 * SIZE)]) == 0


@pytest.mark.skipif(not collapses(), reason="needs Linux 6.1 or newer with huge pages")
def test_a_system_that_refuses(monkeypatch):
    """An advice that the system does not know, as MADV_COLLAPSE is to Linux before 6.1: no error, nothing laid."""
    monkeypatch.setattr(host_memory, "COLLAPSE", 9999)
    assert use_huge_pages([torch.zeros(16 * SIZE)]) == 0


@pytest.mark.parametrize("family", ["english", "turbo"])
def test_the_option_decides(models, monkeypatch, family):
    """The decoding pass offers every matrix of a step, or none."""
    model, offered = models(family), []

    def spied(tensors):
        offered.append([m.data_ptr() for m in tensors])
        return use_huge_pages(tensors)

    monkeypatch.setattr(token_model, "use_huge_pages", spied)
    section = {"backbone": "static", "kernel": "torch", "progress": "off"}
    with optimized(model, {"decoding": section}):
        assert offered == [[m.data_ptr() for m in t3_weights.read(model.t3).matrices()]]
    with optimized(model, {"decoding": {**section, "huge_pages": False}}):
        assert len(offered) == 1
