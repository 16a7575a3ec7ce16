"""Which part of its text each speech token says: one way through the attention that never goes back.

What attention shows is noisy: it skips spaces and silent letters, rests during pauses, looks elsewhere for a moment,
and goes back to what was read. Speech itself goes forward. So the way with the most attention on it is looked for
among those that only go forward (Viterbi 1967; as dynamic time warping for Whisper's words, Radford et al. 2022).
"""

from __future__ import annotations

import numpy as np

FLOOR = 0.01  # attention below it says nothing: a single step that looks elsewhere has a vote of 4.6 nats at most
SKIP = 0.25  # nats for each text token that is passed over


def boundaries(attention: np.ndarray) -> np.ndarray:
    """Where each text token begins to be spoken.

    Text tokens that the way passes over share the step in which it does so. Those that it never comes to (speech was
    cut) begin at the end.

    Args:
        attention: (T, S) float, of each step over the text; row n is what speech token n was chosen after. The first
            row is not read: speech begins at the first text token.

    Returns:
        (S + 1,) float64, from 0 to T, never decreasing: text token s lasts from [s] to [s + 1], in speech tokens.

    Time and memory: T times S; 1000 by 300 take about 25 ms.
    """
    steps, tokens = attention.shape
    states = _path(attention)
    result = np.full(tokens + 1, float(steps))
    reached = -1
    for step in np.flatnonzero(np.diff(states, prepend=-1)):
        count = states[step] - reached
        result[reached + 1 : states[step] + 1] = step + np.arange(count) / count
        reached = states[step]
    return result


def _path(attention: np.ndarray) -> np.ndarray:
    """(T,) int64: the text token of each step, never decreasing."""
    steps, tokens = attention.shape
    votes = np.log(np.maximum(attention, FLOOR))
    columns = np.arange(tokens)
    toll = SKIP * columns
    came = np.zeros((steps, tokens), dtype=np.int32)  # the text token of the step before
    score = np.full(tokens, -np.inf)
    score[0] = 0.0
    for step in range(1, steps):
        # the best of all tokens up to each, less what is passed over on the way from there
        tolled = score + toll
        best = np.maximum.accumulate(tolled)
        first = np.maximum.accumulate(np.where(tolled == best, columns, 0))
        moved = np.concatenate(([-np.inf], best[:-1] - toll[:-1]))
        moves = moved >= score  # as late as it can be: where nothing speaks for either, a word has not begun
        came[step] = np.where(moves, np.concatenate(([0], first[:-1])), columns)
        score = np.where(moves, moved, score) + votes[step]
    states = np.empty(steps, dtype=np.int64)
    states[-1] = score.argmax()
    for step in range(steps - 1, 0, -1):
        states[step - 1] = came[step, states[step]]
    return states
