"""What T3's logits lose to the rounding of its weights alone: groups, bits and schemes, on a full-size English model.

Run: python benchmarks/quantization_rounding.py [NAME ...]. All arithmetic is in fp32, both sides read the same random
tokens in one pass (no guidance), and the first and the last block stay as they are. docs/quantization.md has the table.
"""

import gc
import sys
import warnings

import torch

from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.divergence import compare_logits
from chatterbox_turbo.runtime.device.rounding import quantize

TOKENS, PREFIX = 200, 60
PRODUCTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PRODUCTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def symmetric(group: int, largest: int = 127, scale_bits: int = 0):
    """Integers up to ``largest`` with a bf16 scale a group; or one for 128, and a share of it for each group."""

    def rounded(weight):
        groups = weight.unflatten(1, (-1, group))
        most = groups.abs().amax(-1, keepdim=True)
        if scale_bits:
            whole = most.unflatten(1, (-1, 128 // group)).amax(2).repeat_interleave(128 // group, 1)
            scales, shares = (whole * (1 + 2**-8) / largest).bfloat16().float(), 2**scale_bits
            scales = scales * (most / largest / scales * shares).ceil().clamp(1, shares) / shares
        else:
            scales = (most * (1 + 2**-8) / largest).bfloat16().float()
        scales = scales.clamp(min=1e-20)
        return ((groups / scales).round().clamp(-largest - 1, largest) * scales).flatten(1)

    return rounded


VARIANTS = {
    "bf16": lambda weight: weight.bfloat16().float(),
    "8 bits, groups of 128": symmetric(128),
    "8 bits, groups of 64": symmetric(64),
    "8 bits, groups of 32": symmetric(32),
    "8 bits, groups of 16": symmetric(16),
    "8 bits, groups of 16 with scales of 4 bits": symmetric(16, scale_bits=4),
    "8 bits, groups of 8 with scales of 4 bits": symmetric(8, scale_bits=4),
    "9 bits, groups of 128": symmetric(128, 255),
    "10 bits, groups of 128": symmetric(128, 511),
    "int4": lambda weight: quantize(weight, "int4").dequantize(torch.float32),
    "nf4": lambda weight: quantize(weight, "nf4").dequantize(torch.float32),
    "fp4": lambda weight: quantize(weight, "fp4").dequantize(torch.float32),
}


@torch.inference_mode()
def main():
    """Print a line for each variant."""
    warnings.simplefilter("ignore")
    model = synthetic.build("english", "full")
    t3 = model.t3
    del model.s3gen, model.ve
    gc.collect()
    torch.manual_seed(0)
    ids = torch.randint(0, 6561, (2, TOKENS + 1))
    prefix = torch.randn(1, PREFIX, t3.speech_emb.embedding_dim) * t3.speech_emb.weight.std()
    speech = t3.speech_emb(ids) + t3.speech_pos_emb.emb.weight[: TOKENS + 1]
    embeds = torch.cat([prefix.expand(2, -1, -1), speech], dim=1)

    def logits():
        states = t3.tfmr(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return t3.speech_head(states[:, PREFIX:]).flatten(0, 1)

    expected = logits()
    entropy = torch.distributions.Categorical(logits=expected).entropy().mean().item()
    margin = expected.topk(2).values.diff().abs().median().item()
    print(f"entropy {entropy:.2f} nats, median distance of the two largest logits {margin:.2f}", flush=True)
    products = [layer.get_submodule(name) for layer in t3.tfmr.layers[1:-1] for name in PRODUCTS]
    originals = [product.weight.data for product in products]
    for name in sys.argv[1:] or VARIANTS:
        for product, original in zip(products, originals, strict=True):
            product.weight.data = VARIANTS[name](original)
        print(f"{name}: {compare_logits(logits(), expected)}", flush=True)


if __name__ == "__main__":
    main()
