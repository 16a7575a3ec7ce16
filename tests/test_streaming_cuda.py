"""Streams on a simulated CUDA machine: they sound as on a CPU, wait for their samples alone, and begin warm."""

from __future__ import annotations

import pytest
import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.s3gen.streaming import Windows
from chatterbox_turbo.speech.stream import joined

TEXTS = ("The quick brown fox jumps over the lazy dog.", "Is it two?")
SMALL = Windows(first_chunk=3, chunk=8, growth=1.0, longest_chunk=8)
DECIBELS = 60.0  # of what is promised as numerical


@pytest.mark.parametrize("family", ["english", "turbo"])
def test_streams_beside_each_other_sound_as_alone_on_a_cpu_and_wait_for_samples_alone(simulated, family):
    host = synthetic.build(family, "tiny", stop_after=14)
    turbo.apply(host, {"decoding": {"progress": "off", "kernel": "torch"}})
    # T3's random numbers are those of the device; the acoustic half's are the same ones on the simulated machine
    given = [{"text": text, "seed": n, "windows": SMALL, "temperature": 0.0} for n, text in enumerate(TEXTS)]
    expected = [joined(list(host.turbo.stream(**one))) for one in given]
    model = turbo.apply(simulated.get(family), {"decoding": {"progress": "off"}})
    streams = [model.turbo.stream(**one) for one in given]
    blocks = [[next(one)] for one in streams]
    with simulated.machine.watching() as seen:  # text, voice, captures are behind
        for _ in range(2):
            for one, its in zip(streams, blocks, strict=True):
                its += [block for block in [next(one, None)] if block is not None]
    assert seen.waits and {(one.kind, one.what.partition(",")[0]) for one in seen.waits} == {
        ("sync", "copy to the host")
    }, [str(one) for one in seen.waits]
    for one, its in zip(streams, blocks, strict=True):
        its += list(one)
    for its, other in zip(blocks, expected, strict=True):
        assert joined(its).shape == other.shape and snr_db(joined(its), other) > DECIBELS


@pytest.mark.parametrize("budget", [{}, {"vram_budget": "8GB", "budget_slots": 2}], ids=["no budget", "budget"])
def test_after_a_full_warm_up_streams_begin_without_a_capture(simulated, budget):
    machine, model = simulated.machine, synthetic.build("turbo", "tiny", device="cuda:0", stop_after=24)
    turbo.apply(model, {"decoding": {"progress": "off", "streams": 2}, "warmup": {"level": "full"}, **budget})
    networks = [model.turbo._engines.flow.solver, model.turbo._engines.vocoder.network]
    assert all(len(network.runner.captured) == 1 for network in networks)
    spent = [dict(network._spent) for network in networks]  # by windows that had no graph
    with machine.watching() as seen:
        streams = [model.turbo.stream(TEXTS[0], seed=seed) for seed in (1, 2)]
        for stream in streams:
            next(stream)  # the second one's tokens are decoded beside the first one's
        assert [dict(network._spent) for network in networks] == spent
        for stream in streams:
            stream.close()
        torch.manual_seed(1)
        model.generate(TEXTS[0])
    assert seen.counts["replays"] and not seen.counts["captures"]
    if budget:
        cache = model.turbo._engines.token_model.prepared.current().backbone.cache
        assert 0 < cache.nbytes <= model.turbo.plan.fit.estimate.phases["t3"].cache
    turbo.revert(model)
