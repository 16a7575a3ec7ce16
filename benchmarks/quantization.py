"""What schemes of T3 do to its logits: divergence from bf16 and from fp32 over the same tokens, on a full-size model.

Run: python benchmarks/quantization.py [english|multilingual|turbo] [tokens] [scheme[:strategy] ...]

bf16 speaks, fp32 where the processor is not good at bf16, and all read what it has spoken. int8 and int4 are this
package's kernels. nf4 and fp4 are their numbers in plain layers, multiplied as the others' reference is: what the back
ends for them compute, without making each matrix anew at each step.
docs/quantization.md says what random weights can show.
"""

import sys
import warnings
from contextlib import contextmanager

from torch import nn

from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import UnavailablePassError
from chatterbox_turbo.measure.divergence import FP32, compare_logits, logits_over, spoken
from chatterbox_turbo.measure.fidelity import arguments
from chatterbox_turbo.passes.quantization import STRATEGIES
from chatterbox_turbo.runtime.device.quantized import SCHEMES
from chatterbox_turbo.runtime.device.rounding import quantize
from chatterbox_turbo.upstream.families import identify
from chatterbox_turbo.upstream.t3_quantization import weight_of

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again, for as long as anybody looks."


@contextmanager
def rounded(t3, scheme, strategy):
    """The layers of a strategy with the numbers that a scheme has for their weights."""
    layers = [getattr(*site) for sites in STRATEGIES[strategy].choose(t3) for site in sites]
    originals = [layer.weight.data for layer in layers]
    for layer in layers:
        matrix = weight_of(layer).data
        plain = quantize(matrix, scheme).dequantize(matrix.dtype)
        layer.weight.data = plain if isinstance(layer, nn.Linear) else plain.t().contiguous()
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.weight.data = original


def main():
    """Print a line for each scheme."""
    warnings.simplefilter("ignore")
    given = dict(enumerate(sys.argv))
    family, tokens = given.get(1, "english"), int(given.get(2, 200))
    model = synthetic.build(family, "full", stop_after=tokens)
    half = {"fidelity": "lossy", "precision": {"enabled": True, "t3": "bfloat16"}, **FP32}
    request = arguments(identify(model), TEXT)
    try:
        ids, bf16 = spoken(model, half, request)
        references = {"bf16": bf16, "fp32": logits_over(model, FP32, request, ids)}
        print(f"bf16 from fp32: {compare_logits(bf16, references['fp32'])}", flush=True)
    except UnavailablePassError as error:
        print(f"all in fp32: {error}", flush=True)
        half = {"fidelity": "lossy", **FP32}
        ids, fp32 = spoken(model, half, request)
        references = {"fp32": fp32}
    for asked in sys.argv[3:] or SCHEMES:
        scheme, _, strategy = asked.partition(":")
        strategy = strategy or "balanced"
        if SCHEMES[scheme].table is None:
            config = {**half, "quantization": {"t3": scheme, "strategy": strategy}}
            logits = logits_over(model, config, request, ids)
        else:
            with rounded(model.t3, scheme, strategy):
                logits = logits_over(model, half, request, ids)
        for name, reference in references.items():
            print(f"{asked} from {name}: {compare_logits(logits, reference)}", flush=True)


if __name__ == "__main__":
    main()
