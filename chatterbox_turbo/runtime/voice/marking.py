"""A watermark over blocks of samples that leaves no seam: each block is marked with what surrounds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ...errors import InvalidRequestError, brief

GRID = 240  # samples at 24 kHz from one spectrum of PerTh's to the next
# How far a marked sample depends on others: PerTh's spectra (2048 samples at 32 kHz), its encoder (15 spectra on either
# side), the spectra back, resampling. What is farther than AHEAD changes less than -70 dB, than REACH rounding alone.
REACH, AHEAD = 20 * GRID, 12 * GRID
SHORTEST = 6 * GRID  # PerTh needs 32 ms


class MarkStream:
    """Blocks of samples to marked ones, as many as came in, later by ``ahead`` samples.

    PerTh computes on a grid of spectra, by what lies within ``REACH`` of a sample. A window that begins on that grid
    with ``REACH`` before and behind what is given away gives what one call for everything would, to rounding; with
    ``AHEAD`` behind it, at 76 dB SNR for speech (``docs/streaming.md``). Digital silence is marked by the resampler's
    rounding errors, here as there.

    Args:
        apply: samples (n,) float32 at 24 kHz to marked ones (m,), m <= n.
        ahead: samples that must have come behind those that are given away, a multiple of ``GRID``: the delay.

    Raises:
        InvalidRequestError: ``ahead`` is no multiple of ``GRID``.
    """

    def __init__(self, apply: Callable[[np.ndarray], np.ndarray], ahead: int = AHEAD):
        if ahead < 0 or ahead % GRID:
            raise InvalidRequestError(
                f"ahead is {brief(ahead)}, but must be a multiple of {GRID}.",
                "Windows must begin where one of the watermark's spectra does.",
                f"Choose {max(1, round(ahead / GRID)) * GRID}.",
            )
        self._apply, self._ahead = apply, ahead
        self._samples = np.empty(0, np.float32)  # from sample number _first on
        self._first = self._given = 0
        self._over = False

    def push(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Take samples (n,) float32; the marked ones (m,) that are complete by now, in at most one block.

        Raises:
            InvalidRequestError: the stream has ended.
        """
        self._refuse_if_over()
        # a copy, which a caller may overwrite its own after
        self._samples = np.concatenate([self._samples, np.asarray(samples, dtype=np.float32)])
        return self._blocks()

    def finish(self) -> Iterator[np.ndarray]:
        """The rest, to the last sample.

        Raises:
            InvalidRequestError: the stream has ended before.
        """
        self._refuse_if_over()
        self._over = True
        return self._blocks()

    def run(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """All blocks of a stream, marked."""
        try:
            for block in blocks:
                yield from self.push(block)
            yield from self.finish()
        finally:
            self._over, self._samples = True, self._samples[:0].copy()

    def _refuse_if_over(self) -> None:
        if self._over:
            raise InvalidRequestError("This stream has ended.", "It is for one utterance.", "Make another one.")

    def _blocks(self) -> Iterator[np.ndarray]:
        count = self._first + len(self._samples)
        complete = count if self._over else max(0, count - self._ahead) // GRID * GRID
        if complete <= self._given:
            return
        window = self._samples
        if self._over:  # PerTh gives whole spectra only, and nothing for less than a few
            wanted = max(SHORTEST, -(-len(window) // GRID) * GRID)
            window = np.pad(window, (0, wanted - len(window)))
        marked = np.asarray(self._apply(window), dtype=np.float32)
        block = marked[self._given - self._first : complete - self._first]
        if len(block) != complete - self._given:
            raise InvalidRequestError(
                f"The watermark gave {len(marked)} samples for {len(window)}.",
                "Blocks can be put together only where it keeps every whole spectrum.",
                "Speak without streaming.",
            )
        self._given = complete
        first = max(self._first, complete - REACH)
        self._samples, self._first = self._samples[first - self._first :].copy(), first
        yield block
