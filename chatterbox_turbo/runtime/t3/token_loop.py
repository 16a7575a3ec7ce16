"""The one token loop: a generator over requests. ``generate`` is one request; a batch is several.

How a step is computed is the backbone's business, what the model's family does with logits the procedure's; eager,
compiled and graphed decoding differ only in the backbone handed in. Requests that end leave their place to those
that wait, without stopping the others (continuous batching, Orca 2022).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from .batch import Batch, Chosen, Running
from .requests import Backbone, Constraint, Procedure, Request, Token, Vocabulary
from .token_step import TokenStep


@dataclass
class Loop:
    """What the requests of one model have in common. It may be kept from call to call: graphs live as long as it does.

    Attributes:
        backbone, procedure, vocabulary: see there.
        constraint: for models whose attention decides where speech may end; or ``None``.
        lag: steps that the device may run ahead of the host. Reading a token at once costs a device sync a step;
            tokens past a stop are dropped, and the random numbers that they took are put back.
    """

    backbone: Backbone
    procedure: Procedure
    vocabulary: Vocabulary
    constraint: Constraint | None = None
    lag: int = 0
    _step: TokenStep | None = field(default=None, init=False, repr=False)

    def generate(self, requests: Sequence[Request], slots: int | None = None) -> Iterator[Token]:
        """Tokens of all requests, step by step, until each has ended.

        At most ``slots`` requests run at once (all, where it is ``None``); the others wait, and enter in order.
        A request without a generator of its own draws from the global one, in the order of the running requests.

        Raises:
            DecodingError: a token cannot be drawn; the message names the step.
        """
        requests = list(requests)
        if not requests:
            return iter(())
        rows = max(request.embeds.size(0) for request in requests)
        batch = Batch(self._made(), self.lag, min(slots or len(requests), len(requests)), rows, len(requests) == 1)
        return _run(batch, self.lag, iter(requests))

    def serve(self, source: Iterator[Request | None], slots: int, rows: int) -> Iterator[Token]:
        """As ``generate``, of requests that come while others run, each with a generator of its own.

        Tokens carry the number of the request in the order of the source. Ends when nothing runs and nothing waits.

        Args:
            source: the next request, or ``None`` while there is none; asked before each step.
            rows: of the widest request to come.
        """
        return _run(Batch(self._made(), self.lag, slots, rows, False), self.lag, source)

    def _made(self) -> TokenStep:
        if self._step is None:
            self._step = TokenStep(self.backbone, self.procedure, self.vocabulary, self.constraint)
        return self._step


@torch.inference_mode()
def _run(batch: Batch, lag: int, source: Iterator[Request | None]) -> Iterator[Token]:
    batch.begin()
    numbers, pending = count(), deque[Chosen]()
    while True:
        some: list[Running] = []
        while len(batch.running) + len(some) < batch.slots:
            request = next(source, None)
            if request is None:
                break
            some.append(Running(next(numbers), request))
        if some:
            batch.admit(some)
        if not batch.running and not pending:
            return
        if batch.running:
            pending.append(batch.choose())
        while pending and (len(pending) > lag or not batch.running):
            yield from batch.read(pending.popleft())
        batch.step()
