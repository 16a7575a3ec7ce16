"""The speech tokenizer with weights in 8 bits, as upstream has them and in bf16: time, bytes, tokens that change.

Run: python benchmarks/quantized_tokenizer.py [seconds of the recording] [rounds]. Full-size, random weights, the
bundled recording. Ways take turns; their first turn is not counted. Seconds are the processor's, of all threads:
OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 where others use the machine. docs/quantization.md has the table.
"""

import copy
import statistics
import sys
import time
import warnings

import soundfile
import soxr
import torch
from torch import nn

from chatterbox_turbo import synthetic
from chatterbox_turbo.runtime.cpu.onednn import linear_forward
from chatterbox_turbo.runtime.device.quantized import SCHEMES, QuantizedLinear
from chatterbox_turbo.runtime.device.rounding import quantize
from chatterbox_turbo.runtime.quantization import backend_for

RATE, DIGITS = 16000, 3 ** torch.arange(8)  # a token is eight digits from 0 to 2


def altered(tokenizer, alter):
    """A copy with ``alter(layer)`` in the place of every linear layer that int8 can have."""
    made = copy.deepcopy(tokenizer)
    for owner in list(made.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, nn.Linear) and layer.in_features % SCHEMES["int8"].multiple == 0:
                setattr(owner, name, alter(layer))
    return made


def in_int8(backend):
    """Layers in int8, multiplied by one of the back ends."""
    multiply = backend_for("int8", backend, torch.device("cpu"))[0].multiply
    return lambda layer: QuantizedLinear(quantize(layer.weight.data, "int8"), multiply, layer.bias)


def in_bfloat16(layer):
    """The same layer, its weights rounded to bf16; the arithmetic stays fp32."""
    layer.weight.data = layer.weight.data.bfloat16().float()
    return layer


def by_onednn(layer):
    """The same layer, computed as the pass ``conditioning`` does where that is faster."""
    layer.forward = linear_forward(layer)
    return layer


@torch.inference_mode()
def main():
    """Print a line for each way."""
    warnings.simplefilter("ignore")
    given = dict(enumerate(sys.argv))
    seconds, rounds = float(given.get(1, 10)), int(given.get(2, 5))
    tokenizer = synthetic.build("vc", "full").s3gen.tokenizer
    samples, rate = soundfile.read(synthetic.reference_voice(), dtype="float32")
    wav = torch.from_numpy(soxr.resample(samples, rate, RATE))[None, : int(seconds * RATE)]
    ways = {"fp32, torch": tokenizer, "fp32, oneDNN": altered(tokenizer, by_onednn)}
    ways |= {"weights rounded to bf16": altered(tokenizer, in_bfloat16)}
    ways |= {f"int8, {backend}": altered(tokenizer, in_int8(backend)) for backend in ("native", "torch")}
    expected, _ = tokenizer([wav])
    print(f"{wav.size(1) / RATE:.1f} s, {expected.numel()} tokens, {expected.unique().numel()} different", flush=True)
    times, changed = {name: [] for name in ways}, {}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            tokens, _ = way([wav])
            times[name].append(time.process_time() - start)
            digits = [ids.flatten()[:, None] // DIGITS % 3 for ids in (tokens, expected)]
            changed[name] = (tokens != expected).double().mean(), (digits[0] != digits[1]).double().mean()
    for name, way in ways.items():
        size = sum(tensor.nbytes for tensor in [*way.parameters(), *way.buffers()]) / 1e6
        counted = times[name][1:]
        told = f"{statistics.median(counted):.2f} s ({min(counted):.2f} to {max(counted):.2f}), {size:.0f} MB"
        print(f"{name}: {told}; {changed[name][0]:.1%} of tokens change, {changed[name][1]:.2%} of their digits")


if __name__ == "__main__":
    main()
