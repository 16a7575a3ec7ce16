"""T3 on this package's own step: the same logits as Transformers', weights fused in place, a cache that is let go."""

from __future__ import annotations

import gc
import mmap
import weakref
from pathlib import Path

import pytest
import torch
from cases import TEXT, has_analyzer, speak

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import InvalidRequestError, UnavailablePassError
from chatterbox_turbo.measure.fidelity import sample
from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.t3.backbone import StaticBackbone, TransformersBackbone
from chatterbox_turbo.runtime.t3.cpu_step import CpuStep, unsuitable
from chatterbox_turbo.runtime.t3.kv_cache import BUCKET, KVCache
from chatterbox_turbo.runtime.t3.step_choice import choose_step
from chatterbox_turbo.runtime.t3.transformer import decode_step, prefill
from chatterbox_turbo.upstream import t3 as upstream_t3
from chatterbox_turbo.upstream import t3_weights

QUIET = {"decoding": {"progress": "off"}}
SPEAKING = ("english", "multilingual", "turbo")
HEADS = ((9, 2), (12, 15), (13, 11))


@pytest.fixture
def fused(models, request):
    t3, journal = models(request.param).t3, Journal()
    t3_weights.fuse(t3, journal)
    yield t3
    journal.undo()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    "fused, kernel, positions",
    [
        *((family, kernel, 2048) for family in SPEAKING for kernel in ("torch", "numba")),
        *((family, "torch", 100) for family in SPEAKING),
        ("turbo", "compile", 2048),  # one family is enough: a compilation takes a minute
    ],
    indirect=["fused"],
)
def test_logits_equal_those_of_transformers_within_rounding(fused, kernel, positions, monkeypatch):
    """Prefills of one and of several, then steps of requests of two rows that come and go, across a bucket's end."""
    monkeypatch.setattr("chatterbox_turbo.runtime.t3.backbone.PREFILL_POSITIONS", positions)
    weights = t3_weights.read(fused)
    ours = StaticBackbone(weights, choose_step(weights, (), kernel, graphs=False)[0])
    theirs = TransformersBackbone(upstream_t3.backbone(fused), upstream_t3.head(fused))
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for backbone in (ours, theirs):
            backbone.begin(3, 2)
        for lengths in ((BUCKET - 1,), (17, 40)):
            embeds = [torch.randn(2, length, weights.width, generator=generator) for length in lengths]
            limits = [10] * len(embeds)
            assert relative(ours.admit(embeds, limits), theirs.admit(embeds, limits)) < 1e-5
        for index in range(8):
            if index in (3, 5):
                for backbone in (ours, theirs):
                    backbone.leave(0)
            embeds = torch.randn(2 * (3 - (index > 2) - (index > 4)), weights.width, generator=generator)
            assert relative(ours.step(embeds)[0], theirs.step(embeds)[0]) < 1e-5
    assert ours.cache.capacity == 2 * BUCKET


@pytest.mark.parametrize("numbers", ["fp32", "bf16", "bf16 without its instruction"])
@pytest.mark.parametrize("fused", ["english", "turbo"], indirect=True)
def test_a_row_of_the_numba_step_does_not_depend_on_its_batch(fused, numbers, monkeypatch, request):
    journal = Journal()
    request.addfinalizer(journal.undo)
    if numbers != "fp32":
        t3_weights.cast(fused, torch.bfloat16, journal)
    if "without" in numbers:
        monkeypatch.setattr("chatterbox_turbo.runtime.cpu.instructions.multiplies_pairs", lambda: False)
    weights = t3_weights.read(fused)
    embeds = torch.randn(9, weights.width, generator=torch.Generator().manual_seed(1))

    def logits(rows):
        backbone = StaticBackbone(weights, CpuStep(weights))
        backbone.begin(len(rows), 1)
        for row in rows:
            backbone.admit([embeds[row].expand(1, 5 + row, -1) / (1 + torch.arange(5 + row)[:, None])], [1])
        return backbone.step(embeds[rows])[0]

    with torch.inference_mode():
        together = logits(list(range(9)))
        for some in ([0], [3], [2, 7], [1, 4, 8], [0, 1, 2, 3, 4, 5]):
            assert torch.equal(logits(some), together[some])


@pytest.mark.parametrize("fused", ["english"], indirect=True)
def test_the_numba_step_leaves_the_number_of_threads_as_it_was(fused):
    """numba sets it for the OpenMP runtime that it shares with torch, whose results depend on it in the last bit."""
    weights, before = t3_weights.read(fused), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            backbone = StaticBackbone(weights, CpuStep(weights))
            with torch.inference_mode():
                backbone.begin(1, 1)
                backbone.admit([torch.zeros(1, 3, weights.width)], [2])
                backbone.step(torch.zeros(1, weights.width))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("fused", ["multilingual"], indirect=True)
def test_watched_attention_is_that_of_the_heads(fused):
    """Against the maps of Transformers' eager attention."""
    weights, config = t3_weights.read(fused), fused.tfmr.config
    before = config._attn_implementation
    embeds = torch.randn(2, 31, weights.width, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        try:
            config._attn_implementation = "eager"
            output = fused.tfmr(inputs_embeds=embeds, output_attentions=True, use_cache=False)
        finally:
            config._attn_implementation = before
        expected = torch.stack([output.attentions[layer][:, head, -1] for layer, head in HEADS]).mean(0)
        for step in (CpuStep(weights, HEADS), choose_step(weights, HEADS, "torch", False)[0]):
            backbone = StaticBackbone(weights, step)
            backbone.begin(1, 2)
            backbone.admit([embeds[:, :-1]], [1])
            _, attention = backbone.step(embeds[:, -1])
            assert attention.shape == (1, BUCKET) and attention[0, 31:].abs().max() == 0
            assert (attention[0, :31] - expected[0]).abs().max() < 1e-6
    assert t3_weights.watched_heads(fused) == (((12, 15), (13, 11), (9, 2)) if has_analyzer() else ())


@pytest.mark.parametrize("family", SPEAKING)
def test_weights_are_fused_in_place_and_separated_again(models, family):
    t3 = models(family).t3
    before = {name: (id(p), p.shape, p.stride(), p.detach().clone()) for name, p in t3.named_parameters()}
    size = sum(p.untyped_storage().nbytes() for p in {p.data_ptr(): p for p in t3.parameters()}.values())
    journal = Journal()
    t3_weights.fuse(t3, journal)
    weights = t3_weights.read(t3)
    pointers = {p.untyped_storage().data_ptr() for p in t3.tfmr.parameters()}
    assert all(matrix.untyped_storage().data_ptr() in pointers for matrix in weights.matrices()[:-1]), "a second copy"
    assert all(matrix.is_contiguous() for matrix in weights.matrices())
    assert all(torch.equal(p, before[name][3]) for name, p in t3.named_parameters())
    assert len(pointers) < len(list(t3.tfmr.parameters())) or family == "turbo"
    journal.undo()
    for name, p in t3.named_parameters():
        assert (id(p), p.shape, p.stride()) == before[name][:3] and torch.equal(p, before[name][3])
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name
    after = sum(p.untyped_storage().nbytes() for p in {p.data_ptr(): p for p in t3.parameters()}.values())
    assert after == size


@pytest.mark.parametrize("model", ["english", "turbo"], indirect=True)
def test_weights_that_somebody_casts_or_replaces_after_apply_are_read_anew(model):
    turbo.apply(model, {"decoding": {"progress": "off", "max_new_tokens": 12}})  # whatever head it has for a while
    request = {"text": TEXT}
    expected = sample(model, 0, request).tokens
    model.t3.to(torch.float64)
    model.t3.to(torch.float32)  # every parameter has moved, and no group is fused any more
    assert torch.equal(sample(model, 0, request).tokens, expected)
    with torch.no_grad():
        model.t3.speech_head.weight.data = model.t3.speech_head.weight.data.flip(1)
    assert not torch.equal(sample(model, 0, request).tokens, expected)
    with torch.no_grad():
        model.t3.speech_head.weight.data = model.t3.speech_head.weight.data.flip(1)
    assert torch.equal(sample(model, 0, request).tokens, expected)


def test_a_model_in_bfloat16_speaks(english):
    """Servers cast T3 right after loading it; embeddings are half precision then too."""
    state = {name: p.detach().clone() for name, p in english.t3.named_parameters()}
    turbo.apply(english, QUIET)
    try:
        english.t3.bfloat16()
        english.conds.t3.to(dtype=torch.bfloat16)
        tokens = sample(english, 0, {"text": TEXT}).tokens
        assert tokens.numel() > 3
    finally:
        turbo.revert(english)
        english.t3.float()
        english.conds.t3.to(dtype=torch.float32)
        with torch.no_grad():
            for name, p in english.t3.named_parameters():
                p.copy_(state[name])


@pytest.mark.parametrize("surrounding", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_surroundings_of_a_call_change_nothing(english, surrounding):
    turbo.apply(english, QUIET)
    text = torch.tensor([[255, *range(10, 30), 0]]).repeat(2, 1)

    def tokens():
        torch.manual_seed(0)
        return english.t3.inference(t3_cond=english.conds.t3, text_tokens=text, max_new_tokens=12)

    expected = tokens()
    with surrounding():
        first = tokens()
    assert torch.equal(tokens(), expected)
    if surrounding is torch.inference_mode:
        assert torch.equal(first, expected)


def test_the_cache_is_given_back_after_a_call_on_revert_and_on_collection():
    model, watched, sizes = synthetic.build("english", "tiny", seed=9), [], []

    def look(count, limit):
        sizes.append(watched[0].backbone.cache.nbytes)

    turbo.apply(model, {"decoding": {"progress": look}})
    token_model = model.turbo.token_model
    watched.append(token_model)
    speak(model)
    cache = token_model.backbone.cache
    assert min(sizes) > 0 and cache.nbytes == 0  # on a CPU: not beside what the audio needs
    turbo.revert(model)
    assert token_model.backbone is None
    turbo.apply(model, QUIET)
    gone = weakref.ref(model.turbo.token_model.backbone.cache)
    watched.clear()
    del model, token_model, cache
    gc.collect()
    assert gone() is None


def test_many_generations_do_not_grow_the_cache(english):
    sizes = []

    def look(count, limit):
        sizes.append(english.turbo.token_model.backbone.cache.nbytes)

    turbo.apply(english, {"decoding": {"progress": look}})
    for seed in range(5):
        speak(english, seed)
    assert max(sizes) == sizes[0] > 0


def test_rows_of_the_cache_grow_move_and_leave():
    cache = KVCache(2, 3, 4, torch.float32, torch.device("cpu"))
    cache.begin(4)
    cache.ensure(2)
    for row, length in enumerate((2, 1, 2, 1)):
        cache.append(1, length)
        cache.keys[:, row, :, :length] = row + 1
        cache.values[:, row, :, :length] = -row - 1
    cache.ensure(BUCKET + 1)
    assert cache.capacity == 2 * BUCKET and cache.device_lengths.tolist() == [2, 1, 2, 1]
    cache.drop(0, 2)
    assert cache.lengths == [2, 1] and cache.device_lengths.tolist() == [2, 1, 0, 0]
    assert cache.keys[0, :2, 0, 0].flatten().tolist() == [3, 3, 3, 3, 4, 4, 4, 4]
    cache.count(4)
    cache.advance()
    assert cache.lengths == [3, 2] and cache.device_lengths.tolist() == [3, 2, 0, 0]
    cache.drop(1, 1)
    assert cache.rows == 1
    cache.begin(1)
    assert (cache.rows, cache.keys.size(1), cache.device_lengths.tolist()) == (0, 1, [0])
    cache.release()
    assert cache.nbytes == 0


# -- which step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", ["english"], indirect=True)
def test_what_the_numba_step_cannot_run_is_told_and_left_to_torch(fused):
    weights = t3_weights.read(fused)
    assert unsuitable(weights) == ""
    half = {id(p): p.data for p in fused.tfmr.parameters()}
    try:
        fused.tfmr.half()
        reason = unsuitable(t3_weights.read(fused))
        assert "float16" in reason
        assert choose_step(t3_weights.read(fused), (), "numba", False)[1] == f"torch step: {reason}"
    finally:
        for p in fused.tfmr.parameters():
            p.data = half[id(p)]


def test_a_backbone_with_another_activation_stays_upstreams_or_is_refused(english):
    config = english.t3.tfmr.config
    try:
        config.hidden_act = "gelu"
        with pytest.raises(UnavailablePassError, match="hidden_act"):
            turbo.apply(english, {"decoding": {"enabled": True, "backbone": "static"}})
        turbo.apply(english, QUIET)
        step = english.turbo.plan.step("decoding")
        assert step.status == "on" and "hidden_act = 'gelu'" in step.reason and "upstream's backbone" in step.reason
    finally:
        config.hidden_act = "silu"


def test_text_beyond_the_position_table_is_refused(english):
    turbo.apply(english, QUIET)
    table = english.t3.text_pos_emb.emb.num_embeddings
    text = torch.tensor([[255, *[7] * table, 0]]).repeat(2, 1)
    with pytest.raises(InvalidRequestError, match=f"has {table + 2} tokens, but the model has positions for {table}"):
        english.t3.inference(t3_cond=english.conds.t3, text_tokens=text, max_new_tokens=3)
    assert torch.isfinite(speak(english)).all()


def test_prefill_and_step_continue_each_other(models):
    """A prefix of n positions, or of n - 1 and a step: the same logits and the same cache."""
    t3, journal = models("turbo").t3, Journal()
    t3_weights.fuse(t3, journal)
    weights = t3_weights.read(t3)
    embeds = torch.randn(2, 20, weights.width, generator=torch.Generator().manual_seed(4))
    caches = []
    with torch.inference_mode():
        for split in (20, 19):
            cache = KVCache(len(weights.layers), weights.heads, weights.head_width, torch.float32, weights.device)
            cache.begin(2)
            cache.ensure(20)
            logits = prefill(weights, cache, embeds[:, :split])
            if split == 19:
                again, _ = decode_step(weights, cache, embeds[:, 19], cache.device_lengths, cache.capacity)
                assert relative(again, caches[0][1]) < 1e-5
            caches.append((cache, logits))
    assert relative(caches[1][0].keys, caches[0][0].keys) < 1e-5
    journal.undo()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own count of resident pages")
def test_room_for_positions_takes_memory_as_it_is_written():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    cache = KVCache(8, 4, 64, torch.float32, torch.device("cpu"))
    cache.begin(2)
    cache.ensure(16_000)
    assert cache.nbytes > 2**28 and resident() - before < 2**25
    assert cache.keys[3, 1, 2, 15_000:].abs().max() == 0
    cache.append(2, 500)
    cache.keys[:, :, :, :500] = 1.0
    assert 2**22 < resident() - before < 2**26
    cache.release()
    assert resident() - before < 2**25
