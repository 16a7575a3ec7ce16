"""From speech tokens to samples on the simulated CUDA device: where the host waits, kernels, what is captured when."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.s3gen.flow_solver import FlowSolver, schedule
from chatterbox_turbo.runtime.s3gen.graphed import MAX_GRAPHS, PAYS_AFTER, GraphedNetwork, bucketed
from chatterbox_turbo.runtime.s3gen.vocoder_network import Network
from chatterbox_turbo.upstream import flow_weights, vocoder_weights
from chatterbox_turbo.upstream.families import identify

UPSTREAMS = {  # waits in upstream's own code, which no pass replaces
    ("host_to_device", "chatterbox/models/s3gen/s3gen.py"): 2,  # lengths; an empty source
    ("sync", "chatterbox/models/s3gen/utils/mask.py"): 2,
    ("sync", "chatterbox/models/s3gen/flow.py"): 1,  # tokens out of range
}
STEP_KERNELS = {torch.float32: 700, torch.bfloat16: 860}
VOCODER_KERNELS = {"plain": 505, "padded": 585}
PROMPT = 500  # frames of a voice of ten seconds
OWN = ("runtime/s3gen", "runtime/device", "passes/flow", "passes/vocoder", "upstream/flow", "upstream/watermarker")


def sound(model, tokens=60):
    """Samples of random tokens, on the device."""
    tokens = torch.randint(0, 6561, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    return spoken(model, tokens.to(model.device))


@torch.inference_mode()
def spoken(model, tokens):
    voice = identify(model).voice
    torch.manual_seed(0)
    return model.s3gen.inference(speech_tokens=tokens, ref_dict=dict(getattr(voice, "gen", voice)))[0]


def waits(seen):
    """How often the host waited, by kind and file."""
    return Counter((one.kind, one.place.partition(":")[0]) for one in seen.waits)


def capture_at_once(model):
    engines = model.turbo._engines
    for network in (engines.flow.solver, engines.vocoder.network):
        network.pays_after = 0
    return engines.flow.solver.runner, engines.vocoder.network.runner


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "family, preset", [("english", "auto"), ("english", "fast"), ("turbo", "fast"), ("vc", "auto")]
)
def test_the_host_waits_where_upstream_does_and_nowhere_else(simulated, family, preset):
    machine, model = simulated.machine, simulated.get(family)
    tokens = torch.arange(60, device="cuda")[None]
    with machine.watching() as seen:
        spoken(model, tokens)
    before = waits(seen)
    assert all(before[place] >= count for place, count in UPSTREAMS.items())
    turbo.apply(model, preset)
    for expected in (0, 2, 0):  # captures: none yet, flow and vocoder, replays alone
        with machine.watching() as seen:
            spoken(model, tokens)
        assert waits(seen) == UPSTREAMS, "\n".join(map(str, seen.waits))
        assert seen.counts["captures"] == expected
        assert seen.counts["event_waits"] == 1  # for the bounds of the tokens, which are there by then
        capture_at_once(model)
    assert sum(before.values()) > 2 * sum(UPSTREAMS.values())


@pytest.mark.exhaustive
def test_graphs_of_padded_lengths_give_what_upstream_gives(simulated):
    model = simulated.get("english")
    expected = [sound(model, tokens).cpu() for tokens in (60, 64, 30)]
    turbo.apply(model, "auto")
    runners = capture_at_once(model)
    given = [sound(model, tokens) for tokens in (60, 64, 30)]  # all of them before the first is looked at
    for one, other in zip(given, expected, strict=True):
        assert snr_db(one.cpu(), other) > 80
    assert all(runner.captured and not runner.fallbacks for runner in runners)


def test_a_batch_and_the_watermark_wait_nowhere_by_themselves(simulated):
    machine, model = simulated.machine, simulated.get("english")
    turbo.apply(model, {"watermark": {"device": "model"}, "decoding": {"progress": "off"}})
    with machine.watching() as seen:
        model.turbo.batch([{"text": "One, two, three.", "seed": 1}, {"text": "Four.", "seed": 2}])
    assert seen.waits and not [one for one in seen.waits if any(part in one.place.split(" < ")[0] for part in OWN)]


@pytest.mark.parametrize("wrong, said", [(6561, "token 6561 is out of range"), (-2, "token -2 is out of range")])
def test_tokens_that_are_none_are_refused_and_never_looked_up(simulated, wrong, said):
    """An embedding without such a row ends a process on CUDA."""
    machine, model = simulated.machine, simulated.get("english")
    turbo.apply(model, "auto")
    tokens = torch.tensor([[5, wrong, 7]], device="cuda")
    with machine.watching() as seen, pytest.raises(InvalidRequestError, match=said):
        spoken(model, tokens)
    assert waits(seen) <= Counter(UPSTREAMS)
    assert sound(model).isfinite().all()  # nothing of it is left for the next call


def wide(dtype):
    """The estimator as it is, but for its width, and what ``flow_weights`` wants around it."""
    from chatterbox.models.s3gen.decoder import ConditionalDecoder

    sizes = {"channels": [64], "num_heads": 2, "n_blocks": 4, "num_mid_blocks": 12}
    estimator = ConditionalDecoder(
        in_channels=320, out_channels=80, causal=True, dropout=0.0, attention_head_dim=64, act_fn="gelu", **sizes
    )
    s3gen = SimpleNamespace(flow=SimpleNamespace(decoder=SimpleNamespace(estimator=estimator.eval().to("cuda"))))
    flow_weights.fuse(s3gen, Journal())
    if dtype != torch.float32:
        flow_weights.cast(s3gen, dtype, Journal())
    return s3gen


@pytest.mark.parametrize("dtype", STEP_KERNELS)
@pytest.mark.parametrize("frames", [80, 70])
def test_kernels_of_a_flow_step(simulated, dtype, frames):
    """As many where the length is padded as where it is not."""
    machine = simulated.machine
    with torch.no_grad():
        s3gen = wide(dtype)
        solver = FlowSolver(flow_weights.read(s3gen), disable=False)
        solver.pays_after = 0
        noise, mean, condition = (torch.randn(1, 80, frames, device="cuda") for _ in range(3))
        times = schedule(2, True, noise.device)
        projections, before = flow_weights.time_projections(s3gen, times), set(machine.graphs)
        with machine.watching() as seen:
            solver.solve(noise, times, projections, mean, torch.randn(1, 80, device="cuda"), condition, guidance=0.7)
    (graph,) = set(machine.graphs) - before
    assert 0.9 * STEP_KERNELS[dtype] < graph.kernels <= STEP_KERNELS[dtype], graph.by_op.most_common(12)
    assert seen.counts["captures"] == 1 and seen.counts["replays"] == 2 and not seen.waits


@pytest.mark.parametrize("kind", VOCODER_KERNELS)
def test_kernels_of_the_vocoder(simulated, kind):
    machine, module = simulated.machine, simulated.get("english").s3gen.mel2wav
    with torch.no_grad():
        network = Network(vocoder_weights.read(module, fold=True).network, disable=kind == "plain")
        network.pays_after = 0
        mel, spectrum = torch.randn(1, 80, 30, device="cuda"), torch.randn(1, 18, 3601, device="cuda")
        before = set(machine.graphs)
        with machine.watching() as seen:
            network(mel, spectrum)
    kernels = [graph.kernels for graph in set(machine.graphs) - before] or [seen.counts["kernels"]]
    assert 0.9 * VOCODER_KERNELS[kind] < kernels[0] <= VOCODER_KERNELS[kind]
    assert not seen.waits


class Doubled(GraphedNetwork):
    """A network that costs nothing: the real bookkeeping, and real captures."""

    def __init__(self, longest):
        super().__init__(None, False, lambda x: 4 * x / 2, lambda: ())
        self.longest = longest

    def _run(self, key, x):
        return self._function(x)

    def answer(self, frames, calls=1):
        """Frames that were computed for so many, and whether by a graph."""
        runner, total = self._choose(1, frames, calls)
        x = F.pad(torch.ones(1, frames, device="cuda"), (0, total - frames))
        for _ in range(calls):
            result = runner((total, 1, True), x)
        assert result[0, :frames].eq(2).all()
        return total, runner is self.runner


@pytest.mark.exhaustive
@pytest.mark.parametrize("longest, prompt, calls", [(Network.longest, 0, 1), (FlowSolver.longest, PROMPT, 10)])
def test_captures_in_a_thousand_requests(simulated, longest, prompt, calls):
    """Of 2 to 20 s of speech: what is captured is used, little is padded, and nothing that runs without a graph."""
    machine, random_ = simulated.machine, random.Random(0)
    network, real, computed, replayed = Doubled(longest), 0, 0, 0
    with machine.watching() as seen:
        for _ in range(1000):
            frames = prompt + random_.randint(100, 1000)
            total, graph = network.answer(frames, calls)
            assert total == frames or graph
            real, computed, replayed = real + frames, computed + total, replayed + graph
    assert 5 <= seen.counts["captures"] <= 20, seen.counts["captures"]
    assert seen.counts["captures"] * PAYS_AFTER <= (1000 - replayed) * calls  # never more than was lost without
    assert seen.counts["replays"] == replayed * calls > 0 and computed / real < 1.06


def test_few_lengths_and_at_most_an_eighth_of_padding():
    lengths = [bucketed(frames) for frames in range(1, 4097)]
    assert all(frames <= length for frames, length in enumerate(lengths, 1))
    assert all(length <= 1.125 * frames for frames, length in enumerate(lengths, 1) if frames >= 128)
    assert len({length for length in lengths if length <= Network.longest}) <= MAX_GRAPHS
    assert len({length for length in lengths if 256 < length <= FlowSolver.longest}) <= MAX_GRAPHS


def test_a_graph_is_captured_when_it_pays_and_earned_anew_when_it_was_dropped(simulated, monkeypatch):
    monkeypatch.setattr("chatterbox_turbo.runtime.s3gen.graphed.MAX_GRAPHS", 2)
    machine, network = simulated.machine, Doubled(512)
    with machine.watching() as seen:
        by_graph = [network.answer(100)[1] for _ in range(PAYS_AFTER + 3)]
    assert by_graph == [False] * PAYS_AFTER + [True] * 3 and seen.counts["captures"] == 1
    with machine.watching() as seen:
        for turn in range(8 * PAYS_AFTER):
            network.answer((100, 200, 300)[turn % 3])
    assert seen.counts["captures"] <= 8


def test_a_length_whose_capture_failed_is_not_padded_any_more(simulated):
    network = Doubled(512)
    network.pays_after = 0
    simulated.machine.fail_captures(1)
    assert network.answer(100) == (112, True)
    assert network.runner.fallbacks
    assert network.answer(100) == (100, False) and network.answer(101)[0] == 101
    assert network.answer(200) == (208, True)
