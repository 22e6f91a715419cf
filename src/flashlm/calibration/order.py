"""The order of neurons at rest: hot ones first, then neurons that fire together side by side (Ripple, 2410.19274).

The FFN does not care about the order of its rows, so an order costs nothing at run time. Hot rows at the front can be read
and pinned as one stretch; rows of which a token misses several are then often neighbours, and neighbours are one read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

HOT_RATE = 0.5  # fired for half of the tokens: always worth its slot
BAND_ROWS = 4096  # rows that are chained together: co-activation of all pairs is 64 MiB

Bools = npt.NDArray[np.bool_]
Order = npt.NDArray[np.int64]


def neuron_order(uses: Bools) -> Order:
    """Return the rows in their new order: `order[position]` is the row that comes to lie at `position`.

    Hot rows come first, the hottest at the front; then the others in bands of falling rate, chained within a band; then
    those that never fired, as they were.

    Args:
        uses: bool (num_tokens, num_rows): which rows each token used.
    """
    num_uses = uses.sum(axis=0)
    by_rate = np.argsort(-num_uses, kind="stable")
    rates = num_uses[by_rate] / max(len(uses), 1)
    num_hot = int((rates >= HOT_RATE).sum())
    num_fired = int((rates > 0).sum())
    parts = [by_rate[:num_hot]]
    parts += [chain(uses, band) for band in _bands(by_rate[num_hot:num_fired])]
    return np.concatenate([*parts, by_rate[num_fired:]]).astype(np.int64)


def _bands(rows: Order) -> Iterator[Order]:
    for start in range(0, len(rows), BAND_ROWS):
        yield rows[start : start + BAND_ROWS]


def chain(uses: Bools, rows: Order) -> Order:
    """Return `rows` as a greedy chain: each is followed by the one left that fires with it most alike (cosine)."""
    if len(rows) < 3:
        return rows
    some = uses[:, rows].astype(np.float32)
    alike = some.T @ some
    norms = np.sqrt(np.maximum(np.diag(alike), 1.0))
    alike /= norms[:, None] * norms[None, :]
    np.fill_diagonal(alike, -1.0)
    chained = np.empty(len(rows), dtype=np.int64)
    here = 0
    for position in range(len(rows)):
        chained[position] = here
        alike[:, here] = -1.0  # taken
        here = int(np.argmax(alike[here]))
    return rows[chained]
