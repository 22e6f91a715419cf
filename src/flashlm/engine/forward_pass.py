"""A forward pass: what it is for, what it read, and which way its tokens take through a layer.

A `Pass` belongs to the context (thread or task) that runs it. Streams and caches count into the pass that runs, found
through a context variable, so that passes of several threads on one model never mix; what is read outside of any pass
counts into the model's totals alone.

A pass is of one of three phases: `prompt` (tokens that are new to the model, also in pieces or after a cache), `decode`
(one token per sequence) and `verify` (a few drafted tokens per sequence, checked at once). The phase, and a sequence's own
length, decide how a layer is computed; how many sequences share the pass decides nothing, so a sequence gets in company
what it gets alone. `engine/phases.py` finds out the phase.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch

from flashlm.engine.counters import Counters
from flashlm.rows.kernels import MAX_TOKENS, on_one_torch_thread

Phase = Literal["prompt", "decode", "verify"]
PHASES: tuple[Phase, ...] = get_args(Phase)

Where = torch.Tensor | slice | None  # which tokens of a layer's input: int64 positions, all, or none


@dataclass(kw_only=True, slots=True, eq=False)
class Pass:
    """One run of a model over some tokens.

    Attributes:
        phase: What it is for; of a pass that holds prompts and decoded tokens side by side, `prompt`.
        num_sequences: Sequences in the batch.
        num_tokens: Tokens per sequence.
        totals: The model's running totals, which get this pass's counts when it ends; they say whose pass it is.
        lengths: Of each token the length of its sequence in this pass, int64; None where all are `num_tokens` long.
        counters: What this pass has read, found and waited for.
        wall_s: Time of the pass, without passes that ran inside it; 0 until it has ended.
    """

    phase: Phase
    num_sequences: int
    num_tokens: int
    totals: Counters
    lengths: torch.Tensor | None = None
    counters: Counters = field(default_factory=Counters)
    wall_s: float = 0.0
    _inner_s: float = 0.0

    def run(self, call: Callable[[], Any], *, on_one_thread: bool) -> Any:
        """Return what `call` returns, with this pass as the running one, and end it, whatever comes.

        Args:
            call: The model's own forward.
            on_one_thread: Hold torch to one thread meanwhile, in this thread only.
        """
        outer = running_pass()
        started_s = time.perf_counter()
        try:
            # In a context of its own, which the interpreter leaves for us: no interrupt can leave a pass running.
            return copy_context().run(self._inside, call, on_one_thread)
        finally:
            elapsed_s = time.perf_counter() - started_s
            self.wall_s = elapsed_s - self._inner_s
            if outer is not None:
                outer._inner_s += elapsed_s

    def _inside(self, call: Callable[[], Any], on_one_thread: bool) -> Any:
        _running.set(self)
        return on_one_torch_thread(call) if on_one_thread else call()


_running: ContextVar[Pass | None] = ContextVar("flashlm_pass", default=None)


def running_pass() -> Pass | None:
    """Return the innermost pass that the caller is in, of whichever model."""
    return _running.get()


def counting(totals: Counters) -> Counters:
    """Return where to count: the running pass of the model with these totals, or the totals themselves outside of one."""
    running = _running.get()
    return running.counters if running is not None and running.totals is totals else totals


class Split(NamedTuple):
    """How the tokens of a layer's input go through it.

    Attributes:
        predicted: By the rows that a predictor names for each: approximate.
        few: By row kernels on every row, in tiles: exact, a token's bits the same alone and in a batch.
        many: By matrix products: exact, faster for the long sequences of prompts.
    """

    predicted: Where
    few: Where
    many: Where


EVERY = slice(None)
PREDICTED, FEW, MANY = Split(EVERY, None, None), Split(None, EVERY, None), Split(None, None, EVERY)


def split_tokens(shape: torch.Size, *, has_predictor: bool) -> Split:
    """Return how the tokens of a layer's input, (..., hidden_size), go through the layer.

    Tokens that are decoded or verified take predicted rows where there is a predictor, else row kernels. Prompts are exact:
    sequences of up to `MAX_TOKENS` tokens by row kernels, longer ones by matrix products. A layer that is called by itself,
    outside of any pass, takes one token per sequence as decoded, and (num_tokens, hidden_size) as so many sequences.
    """
    running = _running.get()
    if running is None:
        length = shape[-2] if len(shape) > 2 else 1
        return _way("decode" if length == 1 else "prompt", length, has_predictor)
    lengths = running.lengths
    if lengths is None or len(lengths) != shape[:-1].numel():
        return _way(running.phase, running.num_tokens, has_predictor)
    is_decoded, is_long = lengths == 1, lengths > MAX_TOKENS
    is_predicted = is_decoded if has_predictor else torch.zeros_like(is_decoded)
    return Split(_positions(is_predicted), _positions(~is_predicted & ~is_long), _positions(is_long))


def _way(phase: Phase, length: int, has_predictor: bool) -> Split:
    if phase != "prompt":
        return PREDICTED if has_predictor else FEW
    return FEW if length <= MAX_TOKENS else MANY


def _positions(is_chosen: torch.Tensor) -> Where:
    positions = is_chosen.nonzero().squeeze(1)
    if len(positions) == len(is_chosen):
        return EVERY
    return positions if len(positions) else None


def tiles(num_tokens: int) -> list[slice]:
    """Return consecutive parts of `num_tokens` tokens that row kernels take at once."""
    return [slice(start, min(start + MAX_TOKENS, num_tokens)) for start in range(0, num_tokens, MAX_TOKENS)]
