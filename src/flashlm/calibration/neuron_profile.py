"""How a layer's neurons fire on a text: how many, which, how long they stay in use, and which fire together.

A `LayerProfile` is fed one run of successive tokens after the other and never holds more than one. It knows no model and
no file: only which rows each token uses, as a boolean array, so that it serves for truly active and for predicted rows.

Convention of the use curve (paper §3.1, Fig 4a): s_agg(k) is the share of rows that at least one of k successive tokens
uses, averaged over all k successive tokens of a run. A cache that keeps the rows of the last k tokens therefore holds
s_agg(k) of them and reads s_agg(k+1) - s_agg(k) per token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MAX_WINDOW = 32
MAX_SAMPLED_ROWS = 512  # pairs are counted among so many rows: 1 MiB a layer

Bools = npt.NDArray[np.bool_]


def pack_rows(uses: Bools) -> npt.NDArray[np.uint8]:
    """Return bool (num_tokens, num_rows) as bits, uint8 (num_tokens, ceil(num_rows / 8)), the first row highest."""
    return np.packbits(uses, axis=1)


def unpack_rows(packed: npt.NDArray[np.uint8], num_rows: int) -> Bools:
    """Return what `pack_rows` was given."""
    return np.unpackbits(packed, axis=1, count=num_rows).view(np.bool_)


class UseCurve:
    """s_agg(k) for k = 1 .. `max_window` of one layer; see the module's convention.

    Args:
        num_rows: Rows of the layer.
        max_window: The largest k.
    """

    def __init__(self, num_rows: int, max_window: int = MAX_WINDOW) -> None:
        self.num_rows = num_rows
        self.max_window = max_window
        self._used_rows = np.zeros(max_window, dtype=np.int64)  # summed over all places where k tokens end
        self._num_places = np.zeros(max_window, dtype=np.int64)

    def add(self, uses: Bools) -> None:
        """Count one run of successive tokens, bool (num_tokens, num_rows). O(num_tokens · num_rows)."""
        longest = self.max_window
        since = np.full(self.num_rows, longest, dtype=np.int32)  # tokens since a row was used; 0 is by this one
        for position, used in enumerate(uses):
            np.minimum(since + 1, longest, out=since)
            since[used] = 0
            within = np.cumsum(np.bincount(since, minlength=longest + 1)[:longest])
            reach = min(position + 1, longest)
            self._used_rows[:reach] += within[:reach]
            self._num_places[:reach] += 1

    @property
    def shares(self) -> tuple[float, ...]:
        """s_agg(1), s_agg(2), ..., never falling, as far as the longest run allows."""
        known = self._num_places > 0
        shares = self._used_rows[known] / (self._num_places[known] * self.num_rows)
        return tuple(float(share) for share in np.maximum.accumulate(shares))

    @property
    def increments(self) -> tuple[float, ...]:
        """New rows per token at window k = 0, 1, 2, ...: s_agg(k+1) - s_agg(k), where s_agg(0) = 0."""
        return tuple(float(step) for step in np.diff(self.shares, prepend=0.0))


class LayerProfile:
    """What one layer's neurons did on a text.

    Args:
        num_rows: Rows of the layer.
        max_sampled_rows: Pairs are counted among at most so many rows; among all where the layer has no more.
        seed: Which rows these are.

    Attributes:
        sampled_rows: int32, ascending: the rows whose pairs are counted.
        coactivation: int32 (sampled, sampled): tokens that used both; the diagonal counts a row's own.
        use_curve: s_agg(k) of the rows.
        num_tokens: Tokens counted.
    """

    def __init__(self, num_rows: int, *, max_sampled_rows: int = MAX_SAMPLED_ROWS, seed: int = 0) -> None:
        sampled = np.random.default_rng(seed).permutation(num_rows)[:max_sampled_rows]
        self.num_rows = num_rows
        self.num_tokens = 0
        self.sampled_rows = np.sort(sampled).astype(np.int32)
        self.coactivation = np.zeros((len(self.sampled_rows),) * 2, dtype=np.int32)
        self.use_curve = UseCurve(num_rows)
        self._num_uses = np.zeros(num_rows, dtype=np.int64)

    def add(self, uses: Bools) -> None:
        """Count one run of successive tokens, bool (num_tokens, num_rows)."""
        self.num_tokens += len(uses)
        self._num_uses += uses.sum(axis=0)
        self.use_curve.add(uses)
        sampled = uses[:, self.sampled_rows].astype(np.float32)
        self.coactivation += np.rint(sampled.T @ sampled).astype(np.int32)  # fp32 is exact below 2^24 tokens

    @property
    def active_share(self) -> float:
        """Rows that a token uses over all rows, on average."""
        return float(self._num_uses.sum() / max(self.num_tokens * self.num_rows, 1))

    @property
    def firing_rate(self) -> npt.NDArray[np.float32]:
        """Share of the tokens that use each row, (num_rows,)."""
        return (self._num_uses / max(self.num_tokens, 1)).astype(np.float32)
