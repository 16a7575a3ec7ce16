"""Tokens for whoever wants the next ones: requests that come and go share one batch (continuous batching, Orca 2022).

Nothing runs by itself: who asks for tokens of one request runs the batch, and the others get theirs beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from ...errors import DecodingError
from .. import forks
from .requests import Request, Token

Serve = Callable[[Iterator["Request | None"]], Iterator[Token]]


@dataclass(eq=False)
class Ticket:
    """A request in the service, with what has come of it.

    Attributes:
        ids: speech tokens so far.
        end: why they have ended, as ``Token.end``; ``None`` while they go on.
        reasons: the constraint's flags at the end.
        error: what has ended it instead.
    """

    request: Request
    ids: list[int] = field(default_factory=list)
    end: Literal["stop", "limit", "exhausted"] | None = None
    reasons: int = 0
    error: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether no token comes any more."""
        return self.end is not None or self.error is not None or self.request.abandoned


class Service:
    """The batch of one model; the caller holds the model's lock.

    Args:
        serve: requests as they come (``None`` while there is none) to tokens, until nothing runs and nothing waits.
    """

    def __init__(self, serve: Serve):
        self._serve = serve
        self._waiting: deque[Ticket] = deque()
        self._taken: list[Ticket] = []  # by their number in the run
        self._run: Iterator[Token] | None = None

    def __len__(self) -> int:
        """Requests that wait or run."""
        return sum(not ticket.over for ticket in (*self._waiting, *self._taken))

    def submit(self, request: Request) -> Ticket:
        """A request more, which takes part from the next step on where there is a place."""
        ticket = Ticket(request)
        self._waiting.append(ticket)
        return ticket

    def advance(self, ticket: Ticket, count: int) -> None:
        """Run the batch until a request has ``count`` tokens, or has ended.

        Raises:
            DecodingError: it cannot go on.
        """
        while not ticket.over and len(ticket.ids) < count:
            self._step()
        self.tidy()
        if ticket.error is not None:
            raise ticket.error

    def drain(self) -> None:
        """Run the batch until nobody runs or waits: the model is wanted for something else."""
        while self._waiting or any(not ticket.over for ticket in self._taken):
            self._step()
        self._close()

    def leave(self, ticket: Ticket) -> None:
        """Nobody wants the rest of a request."""
        ticket.request.abandoned = True
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        self.tidy()

    def abort(self, reason: str) -> None:
        """End everything; who waits for tokens is told why."""
        for ticket in (*self._waiting, *self._taken):
            if not ticket.over:
                ticket.error = DecodingError(reason)
        self._waiting.clear()
        self._close()

    def _step(self) -> None:
        if self._run is None:
            self._taken = []
            self._run = self._serve(self._source())
        try:
            with forks.halted(self._lose):
                token = next(self._run, None)
        except BaseException as error:
            self._run = None  # a generator that has raised is over
            failure = error if isinstance(error, Exception) else DecodingError("Decoding was interrupted.")
            # a batch that could not begin has taken nobody: those that wait would try again for ever
            affected = self._taken or [*self._waiting]
            if not self._taken:
                self._waiting.clear()
            for ticket in affected:
                if not ticket.over:
                    ticket.error = failure
            if not isinstance(error, Exception):
                raise
            return
        if token is None:
            self._run = None
            return
        ticket = self._taken[token.request]
        if token.id is not None:
            ticket.ids.append(token.id)
        ticket.end, ticket.reasons = token.end, token.reasons

    def _source(self) -> Iterator[Request | None]:
        while True:
            if not self._waiting:
                yield None
                continue
            ticket = self._waiting.popleft()
            self._taken.append(ticket)
            yield ticket.request

    def tidy(self) -> None:
        """Give the batch's memory back where nobody wants anything of it any more."""
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.over)
        if not self._waiting and all(one.over for one in self._taken):
            self._close()

    def _lose(self) -> None:
        """The run is another thread's, which is not in this process."""
        self._run = None
        self.abort("The process that was forked does not go on with it.")

    def _close(self) -> None:
        run, self._run, self._taken = self._run, None, []
        if run is not None:
            run.close()  # what it holds goes now
