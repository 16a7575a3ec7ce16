"""What a step of training adds up, and its learning rate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_tools import MEL, SETTINGS, mel_function, run, source, write_recordings

from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.runtime.s3gen.vocos_network import build
from chatterbox_turbo.training.segments import Batches, batches
from chatterbox_turbo.training.step import Training
from chatterbox_turbo.training.trainer import _accelerator, _forget


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("audio"))


def losses_of(folder: Path) -> dict[str, float]:
    """Of the first step."""
    return json.loads((folder / "history.jsonl").read_text().splitlines()[0])["losses"]


def test_the_learning_rate_rises_and_falls():
    settings = replace(SETTINGS, steps=100, warmup=10, learning_rate=1.0)
    rates = [settings.rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[100] == 0


def test_the_mel_loss_is_the_mean_over_its_windows(audio, tmp_path):
    first = {}
    for windows in ((512,), (2048,), (512, 2048)):
        out = tmp_path / str(len(first))
        run(audio, out, replace(SETTINGS, steps=1, mel_windows=windows))
        first[windows] = losses_of(out)["mel"]
    assert first[512,] != first[2048,]
    assert first[512, 2048] == pytest.approx((first[512,] + first[2048,]) / 2, rel=1e-5)
    with pytest.raises(InvalidRequestError, match="A window of 8192 samples does not fit into twice 8 frames"):
        run(audio, tmp_path / "long", replace(SETTINGS, mel_windows=(8192,)))
    assert not (tmp_path / "long").exists()


def test_the_loss_of_s3gens_mel_is_the_distance_of_its_frames(audio, tmp_path):
    settings = replace(SETTINGS, steps=1, s3gen_mel_weight=45.0)
    run(audio, tmp_path / "run", settings)
    told, mel = losses_of(tmp_path / "run"), mel_function()
    torch.manual_seed(settings.seed)
    network = build(settings.architecture(MEL.n_fft, MEL.hop), MEL)
    given = mel(next(iter(batches(Batches(source(audio), settings.batch, 0, 1), 0, 1, 0))).samples)
    with torch.no_grad():
        distance = (mel(network(given)) - given).abs().mean().item()
    assert told["S3Gen's mel"] == pytest.approx(45 * distance, rel=1e-4)
    assert told["generator: total"] == pytest.approx(told["mel"] + told["S3Gen's mel"], rel=1e-5)


def test_s3gens_mel_alone_can_be_learned(audio, request):
    """Its gradient reaches the weights, also of samples that are louder than a file holds and are clipped for it."""
    settings = replace(
        SETTINGS, steps=30, mel_only_steps=30, mel_weight=0.0, s3gen_mel_weight=45.0, learning_rate=3e-3
    )  # fmt: skip
    heard, mel = [], mel_function()

    def listening(samples):
        heard.append(samples.detach().abs().max().item())
        return mel(samples)

    torch.manual_seed(0)
    network = build(settings.architecture(MEL.n_fft, MEL.hop), MEL)
    accelerator, _ = _accelerator("no", "cpu")
    request.addfinalizer(lambda: _forget(accelerator))
    training = Training(accelerator, settings, network, MEL.sample_rate, listening)
    with torch.no_grad():
        network.head.out.bias[: len(network.head.out.bias) // 2] += 4.0
    samples = next(iter(batches(Batches(source(audio), settings.batch, 0, 1), 0, 1, 0))).samples
    given = mel(samples)
    assert network(given).abs().max() > 1.5
    found = [training.step(number, given, samples)[0]["S3Gen's mel"] for number in range(settings.steps)]
    assert max(heard) <= 1 + 1e-6
    assert found[-1] < 0.6 * found[0], found
