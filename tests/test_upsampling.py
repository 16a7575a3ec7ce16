"""Transposed convolutions in pieces and by products: the same numbers, and one shape whatever the length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import only, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidConfigError
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.cpu import vocoder_kernels
from chatterbox_turbo.runtime.cpu.upsampling import PIECE, by_product, in_pieces, suitable

LENGTHS = (1, 2, 3, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 7)
HIFT = ((16, 8, 4), (11, 5, 3), (7, 3, 2))  # width, stride, padding
PLAIN = {"dilation": (1,), "groups": 1, "output_padding": (0,)}


@pytest.fixture
def shapes(monkeypatch):
    """Shapes of what transposed convolutions were given."""
    found, function = [], F.conv_transpose1d

    def seen(x, *arguments, **options):
        found.append(tuple(x.shape))
        return function(x, *arguments, **options)

    monkeypatch.setattr(F, "conv_transpose1d", seen)
    return found


@pytest.mark.parametrize("width, stride, padding", [*HIFT, (2, 2, 0), (9, 2, 1), (4, 4, 3), (5, 1, 2)])
def test_pieces_are_the_whole_within_rounding(width, stride, padding, shapes):
    generator = torch.Generator().manual_seed(width)
    weight, bias = torch.randn(8, 6, width, generator=generator), torch.randn(6, generator=generator)
    options = {"stride": (stride,), "padding": (padding,), **PLAIN}
    assert suitable(options)
    for length in LENGTHS:
        x = torch.randn(2, 8, length, generator=generator)
        if (length - 1) * stride + width <= 2 * padding:
            continue  # nothing comes of it
        whole = F.conv_transpose1d(x, weight, bias, **options)
        shapes.clear()
        found = in_pieces(x, weight, bias, options)
        assert len({*shapes}) == 1 and shapes[0][0] == 1, "one shape, whatever the length and the rows"
        assert found.shape == whole.shape and (found - whole).abs().max() < 1e-4
        assert torch.equal(in_pieces(x[1:], weight, bias, options), found[1:])
        last = in_pieces(x, weight, bias, options, channels_last=True)
        assert torch.equal(last, found) and last.transpose(1, 2).is_contiguous()
        product = by_product(x, weight, bias, options, vocoder_kernels)
        assert product.shape == whole.shape and (product - whole).abs().max() < 1e-4


def test_other_transposed_convolutions_stay_whole():
    for option in ({"dilation": (2,)}, {"groups": 2}, {"output_padding": (1,)}):
        assert not suitable({"stride": (2,), "padding": (0,), **PLAIN, **option})


@pytest.mark.parametrize("model", ["turbo"], indirect=True)
@pytest.mark.parametrize("fidelity, upsampling", [("numerical", "auto"), ("exact", "auto"), ("numerical", "whole")])
def test_the_vocoder_chooses_by_the_ceiling(model, shapes, fidelity, upsampling):
    expected = speak(model, 3)
    section = {"enabled": True, "upsampling": upsampling, "layout": "channels_first"}
    config = {**only(), "fidelity": fidelity, "vocoder": section}
    turbo.apply(model, config)
    shapes.clear()
    found = speak(model, 3)
    pieces = (fidelity, upsampling) == ("numerical", "auto")
    assert model.turbo.plan.step("vocoder").fidelity == ("numerical" if pieces else "exact")
    assert pieces or torch.equal(found, expected)
    assert ("upsampling in pieces" in str(model.turbo.report())) == pieces
    assert snr_db(expected, found) > 60
    lengths = {length for _, _, length in shapes}
    assert lengths and all((length in range(PIECE, PIECE + 9)) == pieces for length in lengths)


@pytest.mark.parametrize("model", ["turbo"], indirect=True)
def test_pieces_are_above_the_ceiling_exact(model):
    with pytest.raises(InvalidConfigError, match="vocoder"):
        turbo.apply(model, {"fidelity": "exact", "vocoder": {"enabled": True, "upsampling": "pieces"}})
