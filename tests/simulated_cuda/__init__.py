"""A simulated CUDA machine over CPU memory, with real values, for tests on machines without a GPU.

``with simulated_cuda() as machine:`` makes ``torch.cuda`` a machine with two devices. Tensors report ``cuda:N`` and
compute on the CPU, so that results can be compared. What a GPU would refuse raises here: operands on two devices,
waiting or pageable copies or unregistered random numbers while a graph is captured. What a GPU would do slowly is
recorded with the lines that cause it. Copies to pinned memory arrive when an event or stream behind them is waited for;
until then the host reads garbage. Works with torch 2.6; on other releases ``unsupported()`` says why not.

- ``machine.recorded``: every ``Happening`` (kind, what, place): ``sync`` (the host waits), ``host_to_device`` (a copy
  from pageable memory, which waits too), ``upload`` and ``download`` (pinned, without waiting).
- ``machine.counts``: how many of each, and ``kernels`` launched one by one, ``replays``, ``captures``, ``launches``
  (kernels and replays), ``events``; ``machine.by_op``: kernels by operation.
- ``machine.captures``, ``machine.replays``: their numbers; ``machine.graphs``: the graphs that are alive, each with
  ``kernels`` and ``by_op``.
- ``with machine.watching() as seen:``: a ``Watch`` with ``recorded``, ``counts``, ``by_op`` of the body alone.
- ``with machine.forbid_syncs():``: the first ``sync`` or ``host_to_device`` in the body raises ``ForbiddenSync``.
- ``machine.generators[N]``: the default random generator of a device.
- ``machine.free``, ``reserved``, ``allocated``, ``peak``, ``inactive``, ``segments``: what the allocator says of
  itself, set by a test; ``machine.emptied``: how often its cache was emptied.
- ``machine.fail_captures(number)``: so many captures from now on fail in the middle, as when memory runs out.

Own kernels run as ``torch.library`` operators with an implementation for the CPU; each counts as one kernel.
"""

from .installation import simulated_cuda, unsupported
from .machine import ForbiddenSync, Happening, Machine, Watch
from .tensors import SimulatedTensor

__all__ = ["ForbiddenSync", "Happening", "Machine", "SimulatedTensor", "Watch", "simulated_cuda", "unsupported"]
