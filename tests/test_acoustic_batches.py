"""The encoder against upstream's, utterances of several lengths in one batch, speech tokens that are none."""

from __future__ import annotations

import pytest
import torch

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.passes.flow import CPU_BATCH_FRAMES
from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.cpu import onednn as products
from chatterbox_turbo.runtime.s3gen import attention as flow_attention
from chatterbox_turbo.runtime.s3gen import flow_solver, speech_encoder
from chatterbox_turbo.runtime.s3gen.attention import Relative, attend
from chatterbox_turbo.runtime.s3gen.flow_solver import FlowSolver
from chatterbox_turbo.runtime.s3gen.frames import whole_blocks
from chatterbox_turbo.runtime.s3gen.scratch import Scratch
from chatterbox_turbo.runtime.s3gen.speech_encoder import SpeechEncoder
from chatterbox_turbo.upstream import encoder_weights
from chatterbox_turbo.upstream.families import identify
from chatterbox_turbo.upstream.stages import stages

LENGTHS = (1, 40, 17)
ACOUSTIC = {"flow": {"enabled": True}, "vocoder": {"enabled": True}}


@pytest.fixture
def encoder(models):
    """Upstream's encoder and ours over the same weights."""
    model, journal = models("english"), Journal()
    encoder_weights.fuse(model.s3gen, journal)
    yield model.s3gen.flow.encoder, SpeechEncoder(encoder_weights.read(model.s3gen))
    journal.undo()


def embedded(tokens, rows=1):
    return torch.randn(rows, tokens, 512, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 100])
@torch.inference_mode()
def test_encoder_equals_upstreams(encoder, monkeypatch, onednn, tokens):
    monkeypatch.setattr(products, "onednn_is_faster", lambda threads: onednn)
    upstreams, ours = encoder
    expected, masks = upstreams(embedded(tokens), torch.tensor([tokens]))
    given = ours(embedded(tokens), [tokens])
    assert given.shape == expected.shape == (1, 2 * tokens, 512) and masks.all()
    assert snr_db(given, expected) > 100


@pytest.mark.parametrize("onednn", [False, True])
@torch.inference_mode()
def test_padded_tokens_equal_their_own_runs(encoder, monkeypatch, onednn):
    monkeypatch.setattr(products, "onednn_is_faster", lambda threads: onednn)
    _, ours = encoder
    x = embedded(max(LENGTHS), len(LENGTHS))
    together = ours(x, LENGTHS)
    for row, length in enumerate(LENGTHS):
        assert snr_db(together[row, : 2 * length], ours(x[row : row + 1, :length], [length])[0]) > 100


@pytest.mark.parametrize("onednn", [False, True])
def test_relative_positions_by_their_definition(monkeypatch, onednn):
    monkeypatch.setattr(products, "onednn_is_faster", lambda threads: onednn)
    q, k, v, p = (torch.randn(2, 3, 6, 32, generator=torch.Generator().manual_seed(n)) for n in range(4))
    keys = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(4))
    added = torch.zeros(2, 3, 6, 6)
    for i in range(6):
        for j in range(6):  # keys begin at the distance 5, a query behind its key
            added[:, :, i, j] = (p[:, :, i] * keys[:, 5 - (i - j)]).sum(-1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
    assert snr_db(attend(q, k, v, None, Scratch(), Relative(p, keys)), expected) > 110


@pytest.mark.parametrize("size", [1.0, 40.0])
@pytest.mark.parametrize("kernel", [True, False])
def test_half_precision_attention_with_small_and_large_scores(monkeypatch, size, kernel):
    """Large ones overflow without the softmax's subtraction of the largest."""
    if not kernel:
        monkeypatch.setattr(flow_attention, "_kernels", lambda: ())
    monkeypatch.setattr(products, "onednn_is_faster", lambda threads: False)
    q, k, v = (torch.randn(1, 4, 50, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3))
    q = q * size
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    given = attend(q, k, v, None, Scratch()).float()
    assert (q.norm(dim=-1).max() * k.norm(dim=-1).max() < 8 * flow_attention.SMALL) == (size == 1.0)
    assert snr_db(given, expected) > 25


def test_vocoder_of_several_lengths_equals_own_runs(models):
    model = models("english")
    mels = [torch.randn(1, 80, n, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    with turbo.optimized(model, ACOUSTIC):
        vocoder = model.turbo._engines.vocoder
        torch.manual_seed(5)
        alone = [vocoder.speak(mel) for mel in mels]
        torch.manual_seed(5)
        sources = [vocoder.source(mel) for mel in mels]
        together = vocoder.speak_all(mels, sources)
    for (samples, source), drawn, given in zip(alone, sources, together, strict=True):
        assert torch.equal(source, drawn)
        assert given.shape == samples.shape and snr_db(given, samples) > 90


@pytest.mark.parametrize("limit, sizes", [(100_000, [4]), (1, [1, 1, 1, 1]), (None, None)])
def test_audio_of_a_batch_is_computed_together(models, monkeypatch, limit, sizes):
    model, seen = models("english"), []
    items = [{"text": text, "seed": n} for n, text in enumerate(("One.", "One, two.", "One, two, three.", "Four."))]
    solve = FlowSolver.solve

    def spy(self, noise, *args, **kwargs):
        seen.append((noise.size(0), noise.size(2)))
        return solve(self, noise, *args, **kwargs)

    with turbo.optimized(model, {"flow": {"batch_frames": limit}, "decoding": {"progress": "off"}}):
        monkeypatch.setattr(FlowSolver, "solve", spy)
        model.turbo.batch(items)
    assert sum(rows for rows, _ in seen) == len(items)
    if sizes is not None:
        assert [rows for rows, _ in seen] == sizes
    else:
        assert all(rows == 1 or rows * frames <= CPU_BATCH_FRAMES for rows, frames in seen)


@pytest.mark.parametrize("family", ["english", "turbo"])
def test_speech_tokens_that_are_none(models, family):
    model = models(family)

    def sound(tokens):
        torch.manual_seed(0)
        return model.s3gen.inference(speech_tokens=tokens, ref_dict=dict(model.conds.gen))[0]

    # more than T3 speaks, where flow matching takes two steps
    many = torch.randint(0, 6561, (1, 1010 if family == "turbo" else 60), generator=torch.Generator().manual_seed(0))
    expected = [sound(tokens) for tokens in (many[:, :1], many)]
    with turbo.optimized(model, ACOUSTIC):
        for tokens, said in (
            (many[:, :0], "There are no speech tokens"),
            (torch.tensor([[6561, 7000]]), "token 7000 is out of range.*0 to 6560"),
            (torch.tensor([[5, -1]]), "token -1 is out of range"),
        ):
            with pytest.raises(InvalidRequestError, match=said):
                sound(tokens)
        for tokens, reference in zip((many[:, :1], many), expected, strict=True):
            assert snr_db(sound(tokens), reference) > 60


@pytest.mark.parametrize("frames", [805, 806])
def test_half_precision_on_a_cpu_is_computed_in_multiples_of_eight(frames):
    bf16, fp32 = torch.bfloat16, torch.float32
    assert whole_blocks(frames, bf16, torch.device("cpu")) == 808 == whole_blocks(808, bf16, torch.device("cpu"))
    assert whole_blocks(frames, fp32, torch.device("cpu")) == frames == whole_blocks(frames, bf16, torch.device("cuda"))


@pytest.mark.parametrize("tokens", [4, 13])
def test_what_is_added_for_that_is_not_heard(models, monkeypatch, tokens):
    """In the encoder and in flow matching, for one utterance and for two."""
    model, asked = models("turbo"), []

    def none(frames, *_):
        asked.append(frames)
        return frames

    speech = torch.randint(0, 6000, (tokens,), generator=torch.Generator().manual_seed(tokens))
    with turbo.optimized(model, {"fidelity": "lossy", "precision": {"flow": "bfloat16", "encoder": "bfloat16"}}):
        parts, results = identify(model), []
        for _ in range(2):
            torch.manual_seed(0)
            results.append(stages(parts).frames(speech, stages(parts).voice_reference(parts.voice)))
            for module in (flow_solver, speech_encoder):
                monkeypatch.setattr(module, "whole_blocks", none)
    assert len(asked) == 2 and asked[1] % 8
    assert results[0].shape == results[1].shape == (1, 80, 2 * tokens)
    assert snr_db(*results) > 40
