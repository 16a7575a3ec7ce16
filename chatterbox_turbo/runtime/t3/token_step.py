"""From logits to a token and on to the next logits, for all requests at once: one CUDA graph where there are graphs.

Everything that a token needs is in static tensors on the device, one place for each request. What is left outside of
the graph are the random numbers, which come from the requests' own generators, and the copy of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from ..device.graphs import GraphRunner
from .backbone import padded
from .requests import Backbone, Constraint, Procedure, Vocabulary
from .sampling import Knobs, SamplingParameters, fill_noise, guide, sample


class Places:
    """The static tensors of a number of requests, of which the first are in use.

    Attributes:
        logits: (slots * rows, V), of the tokens to choose next.
        noise: (slots, V), random numbers for the next draw.
        seen: (slots, V) bool, the ids of each history.
        previous: (slots, 1) int64, the newest ids.
        counts: (slots,) int64, tokens chosen so far; ``used`` (slots,) int64 is what a token adds to them, 0 or 1.
        results: (slots, 3) int64, the newest tokens with their status and reasons.
        knobs: the sampling parameters.
    """

    @torch.inference_mode(False)  # ordinary tensors can be written inside and outside of inference mode
    def __init__(self, slots: int, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device):
        self._fitting = (vocabulary, dtype, device)
        self.slots, self.sequences = slots, slots * rows
        self.logits = torch.zeros((slots * rows, vocabulary), dtype=dtype, device=device)
        self.noise = torch.ones((slots, vocabulary), dtype=dtype, device=device)
        self.seen = torch.zeros((slots, vocabulary), dtype=torch.bool, device=device)
        self.previous = torch.zeros((slots, 1), dtype=torch.long, device=device)
        self.counts, self.used = torch.zeros((2, slots), dtype=torch.long, device=device)
        self.results = torch.zeros((slots, 3), dtype=torch.long, device=device)
        self.reasons = torch.zeros(slots, dtype=torch.long, device=device)  # of no constraint
        self.knobs = Knobs([SamplingParameters()] * slots, dtype, device)
        self._landing: list[tuple[Tensor, torch.cuda.Event]] = []

    def fit(self, slots: int, sequences: int, logits: Tensor) -> bool:
        """Whether there is room for so many requests with logits of this kind."""
        kind = (logits.size(-1), logits.dtype, logits.device)
        return kind == self._fitting and slots <= self.slots and sequences <= self.sequences

    @torch.inference_mode(False)
    def landing(self, number: int) -> tuple[Tensor, torch.cuda.Event]:
        """Pinned memory on the host for one result of all places, and an event; each number has its own."""
        while len(self._landing) <= number:
            host = torch.empty(self.results.shape, dtype=self.results.dtype, device="cpu", pin_memory=True)
            self._landing.append((host, torch.cuda.Event()))
        return self._landing[number]

    def changed(self) -> list[Tensor]:
        """What a token changes."""
        return [self.logits, self.seen, self.previous, self.counts, self.results]

    def addresses(self) -> tuple[int, ...]:
        """Fingerprint of all that a token reads and writes."""
        read = (self.noise, self.used, self.reasons, *self.knobs.tensors())
        return tuple(one.data_ptr() for one in (*self.changed(), *read))


class TokenStep:
    """One token for every request that runs; it outlives the calls, as its graphs do.

    Args:
        backbone, procedure, vocabulary, constraint: see ``token_loop.Loop``.
    """

    def __init__(self, backbone: Backbone, procedure: Procedure, vocabulary: Vocabulary, constraint: Constraint | None):
        self.backbone, self.procedure, self.vocabulary, self.constraint = backbone, procedure, vocabulary, constraint
        self.places: Places | None = None
        self.runner: GraphRunner | None = None
        self._slots = self._rows = 1

    def begin(self, slots: int, rows: int) -> None:
        """Expect at most so many requests, each of so many sequences."""
        self._slots, self._rows = self._padded(slots), rows
        self.backbone.begin(slots, rows)
        if self.constraint is not None:
            self.constraint.begin(self._slots)
        if self.places is not None:  # of a call that may have been abandoned
            self.places.used.zero_()
            self.places.counts.zero_()

    def admit(self, logits: Tensor, first: int) -> None:
        """Requests more from place ``first`` on: logits (n * rows, V)."""
        rows, places = self._rows, self.places
        if places is None or not places.fit(self._slots, self._slots * rows, logits):
            places = self.places = Places(self._slots, rows, logits.size(-1), logits.dtype, logits.device)
        last = first + logits.size(0) // rows
        places.logits[first * rows : last * rows] = logits
        places.seen[first:last] = False
        places.seen[first:last, self.vocabulary.start] = True
        places.previous[first:last] = self.vocabulary.start
        places.counts[first:last] = 0
        places.used[first:last] = 1

    def leave(self, place: int, last: int) -> None:
        """A request goes; the last one takes its place."""
        places, rows = self.places, self._rows
        if place != last:
            places.logits[place * rows : (place + 1) * rows] = places.logits[last * rows : (last + 1) * rows]
            for tensor in (places.seen, places.previous, places.counts):
                tensor[place] = tensor[last]
        places.used[last] = 0
        places.counts[last] = 0  # where it stays: the index of an embedding
        self.backbone.leave(place)
        if self.constraint is not None:
            self.constraint.leave(place)

    def set_knobs(self, parameters: Sequence[SamplingParameters]) -> None:
        """The requests that run from now on."""
        rows = self._padded(len(parameters))
        self.places.knobs.set(parameters, rows)
        if self.backbone.captured and self.constraint is not None:
            self.constraint.expect(rows)

    def draw(self, generators: Sequence[Generator | None]) -> None:
        """Random numbers for one token of each request, from its own generator."""
        fill_noise(self.places.noise, generators, self.places.knobs.greedy)

    def __call__(self, count: int) -> None:
        """One token for each of the first places; on a captured backbone the next logits too."""
        if not self.backbone.captured:
            return self._choose(count)
        places = self.places
        if self.runner is None:
            self.runner = GraphRunner(
                self._run,
                disable=False,
                device=places.results.device,
                addresses=self._addresses,
                changes=self._changed,
            )
        keeping = None if self.constraint is None else self.constraint.keeping()
        self.runner((self._padded(count), self._rows, self.backbone.shape(), places.knobs.filters, keeping))
        self.backbone.advance()
        return None

    def advance(self, count: int) -> None:
        """The next logits of the first places, unless they are there already."""
        if not self.backbone.captured:
            self._advance(count, self.backbone.step)

    def _run(self, key: tuple) -> Tensor:
        self._choose(key[0])
        self._advance(key[0], self.backbone.compute)
        return self.places.results

    def _choose(self, count: int) -> None:
        places, procedure, constraint, rows = self.places, self.procedure, self.constraint, self._rows
        previous, seen, counts = places.previous[:count], places.seen[:count], places.counts[:count]
        logits = guide(places.logits[: count * rows].unflatten(0, (count, rows)), places.knobs.guidance)
        if constraint is not None:
            logits = constraint.constrain(logits, previous[:, 0])
        filtered = procedure.filter(logits, seen, places.knobs)
        tokens, status = sample(filtered, places.knobs, places.noise[:count])
        if not procedure.history_keeps_start:
            seen &= counts[:, None] > 0
        seen.scatter_(1, tokens, True)
        previous.copy_(tokens)
        counts += places.used[:count]
        reasons = None if constraint is None else constraint.reasons()
        reasons = places.reasons[:count] if reasons is None else reasons
        torch.cat([tokens, status, reasons[:, None]], dim=1, out=places.results[:count])

    def _advance(self, count: int, step: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> None:
        places, rows = self.places, self._rows
        embeds = self.vocabulary.embed(places.previous[:count], places.counts[:count])
        logits, attention = step(embeds[:, None].expand(-1, rows, -1).flatten(0, 1))
        places.logits[: count * rows] = logits
        if self.constraint is not None:
            self.constraint.observe(attention)

    def _padded(self, count: int) -> int:
        """Places that are computed for so many requests: graphs are captured for some numbers only."""
        return padded(count) if self.backbone.captured else count

    def _addresses(self) -> tuple:
        constraint = () if self.constraint is None else tuple(one.data_ptr() for one in self.constraint.tensors())
        return self.places.addresses(), self.backbone.addresses(), self.vocabulary.addresses(), constraint

    def _changed(self) -> list[Tensor]:
        constraint = () if self.constraint is None else self.constraint.tensors()
        return [*self.places.changed(), *self.backbone.changed(), *constraint]
