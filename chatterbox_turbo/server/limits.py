"""How much a server takes on, and for how long it waits."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidRequestError, brief

MB = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    Attributes:
        slots: requests in flight, which share T3's batch.
        queue: requests that wait for a slot; one more is refused (429).
        text: characters of a request.
        upload: bytes of a recording.
        recording: seconds of a recording, decoded.
        voices: voices that may be uploaded beside those that were there.
        receiving: seconds that the body of a request may take to arrive.
        sending: seconds that a client may leave what was sent to it unread.
        draining: seconds that requests in flight have left when the server is told to end.

    Raises:
        InvalidRequestError: one is not above 0 (``queue``: not 0 or more).
    """

    slots: int = 8
    queue: int = 32
    text: int = 4096
    upload: int = 20 * MB
    recording: float = 60.0
    voices: int = 100
    receiving: float = 30.0
    sending: float = 30.0
    draining: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 or (value == 0 and name == "queue")):
                raise InvalidRequestError(f"{name} is {brief(value)}, but must be above 0.")

    @property
    def body(self) -> int:
        """Bytes of a request that is no upload: every character of the text as two escapes, and the rest."""
        return 12 * self.text + 16_384

    @property
    def form(self) -> int:
        """Bytes of a form with a recording."""
        return self.upload + 16_384
