"""The loss of all positions without the logits of all positions: the output layer runs on a few positions at a time.

The decoder runs once. Then the family's own forward is called again for each piece of positions (`logits_to_keep` takes
their indices), with the decoder's output played back, so that whatever a family does to its logits (scaling, capping) is
done. transformers' own loss function gives each piece's sum, and the pieces are put together as it would: mean over
labels that are not ignored, or sum over `num_items_in_batch`. A family that adds a term of all logits at once is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from flashlm.engine.withheld import withhold
from flashlm.errors import BudgetError
from flashlm.transformers_seam import ForCausalLMLoss

Forward = Callable[..., Any]


@dataclass
class _Running:
    """The pieces of one pass so far."""

    positions: torch.Tensor
    tokens: torch.Tensor  # what the decoder is called with
    has_output: bool = False
    output: Any = None  # the decoder's
    vocab_size: int = 0
    logits_dtype: torch.dtype = torch.float32
    num_losses: int = 0
    num_labels: int = 0
    num_items: Any = None
    total: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def is_piece(self, value: Any) -> bool:
        """Return whether an output is the last piece's logits."""
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        return len(shape) == 3 and tuple(shape[1:]) == (len(self.positions), self.vocab_size)

    def loss(self) -> torch.Tensor:
        """Return the loss of all pieces, as transformers would: nan where every label is ignored."""
        return (self.total / (self.num_labels if self.num_items is None else self.num_items)).to(torch.float32)


class ChunkedLoss:
    """Runs passes with labels in pieces; one for each model, used by several threads."""

    def __init__(self) -> None:
        self._threads = threading.local()

    @property
    def _running(self) -> _Running | None:
        return getattr(self._threads, "running", None)

    def decode(self, decode: Forward, given: Iterable[Any]) -> Any:
        """Return what the decoder gives, in a later piece what it gave before.

        Args:
            decode: Runs the decoder.
            given: Its arguments. Only with the pass's own tokens is it the pass's own call: a hook may call it too.
        """
        running = self._running
        if running is None or not any(each is running.tokens for each in given):
            return decode()
        if not running.has_output:
            with self.suspended():
                output = decode()
            running.output, running.has_output = output, True
        return running.output

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """While a model runs inside the pass (a hook calls it), nothing is played back to it."""
        running, self._threads.running = self._running, None
        try:
            yield
        finally:
            self._threads.running = running

    def loss_function(self, plain: Forward) -> Forward:
        """Return transformers' loss function `plain`, or while a pass runs in pieces the one that adds them up."""
        running = self._running
        return plain if running is None else _adder(running, plain)

    def run(self, forward: Forward, call: dict[str, Any], num_positions: int, *, available_bytes: int) -> Any:
        """Run a pass with labels.

        Args:
            forward: The model's plain forward.
            call: Its arguments by name; input ids or embeddings are (num_sequences, num_tokens, ...).
            num_positions: How many positions of every sequence at once.
            available_bytes: What the budget has for logits, for messages.

        Returns:
            What `forward` returns, with the loss of all positions and `WithheldLogits`.

        Raises:
            BudgetError: The family's loss can't be made in pieces.
        """
        num_sequences, num_tokens = _tokens(call).shape[:2]
        running = self._threads.running = _Running(positions=torch.empty(0, dtype=torch.long), tokens=_tokens(call))
        extras: list[float] = []
        try:
            for start in range(0, num_tokens, num_positions):
                running.positions = torch.arange(start, min(start + num_positions, num_tokens))
                output = forward(**{**call, "logits_to_keep": running.positions})
                extras.append(float(output[0]))
                if not running.has_output or running.num_losses != len(extras):
                    raise _cannot("does not make its loss as other families do", available_bytes)
        finally:
            self._threads.running = None
        if any(abs(extra - extras[0]) > 1e-6 * max(abs(extras[0]), 1e-3) for extra in extras):
            raise _cannot("adds a term of all logits to its loss", available_bytes)
        loss = running.loss() + extras[0]  # what a family adds that is no function of the logits: routing losses
        logits = withhold((num_sequences, num_tokens, running.vocab_size), running.logits_dtype, available_bytes)
        if isinstance(output, tuple):  # the routers' loss may come before the logits
            return (loss, *(logits if running.is_piece(value) else value for value in output[1:]))
        output.loss, output.logits = loss, logits
        return output


def can_chunk(model: Any, call: dict[str, Any]) -> bool:
    """Return whether the loss of a call can be made in pieces: a causal language model's, of all positions."""
    labels, kept = call.get("labels"), call.get("logits_to_keep", 0)
    is_whole = isinstance(kept, int) and kept == 0
    return (
        is_whole
        and isinstance(labels, torch.Tensor)
        and labels.shape == _tokens(call).shape[:2]
        and type(model).plain_loss_function(model) is ForCausalLMLoss
    )


def _adder(running: _Running, plain: Forward) -> Forward:
    def add(
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Add a piece's sum; returns nothing of it, so that what a family adds to the loss can be told apart."""
        if shift_labels is None:
            assert labels is not None
            shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(len(logits), -1)[:, running.positions].contiguous()
        if logits.shape[:2] != targets.shape:
            return logits.new_zeros((), dtype=torch.float32)  # not counted, which `run` notices
        part = plain(
            logits=logits,
            labels=None,
            vocab_size=vocab_size,
            num_items_in_batch=1,
            ignore_index=ignore_index,
            shift_labels=targets,
            **others,
        )
        running.total += part.double()
        running.num_labels += int((targets != ignore_index).sum())
        running.num_items = num_items_in_batch
        running.vocab_size, running.logits_dtype = logits.shape[-1], logits.dtype
        running.num_losses += 1
        return logits.new_zeros((), dtype=torch.float32)

    return add


def _tokens(call: dict[str, Any]) -> torch.Tensor:
    tokens: torch.Tensor = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    return tokens


def _cannot(why: str, available_bytes: int) -> BudgetError:
    return BudgetError(
        f"this family {why}, so it can't be made in pieces, and all logits at once do not fit: use fewer tokens, more"
        " dram, or logits_to_keep with a loss of your own",
        needed_bytes=available_bytes + 1,
        available_bytes=available_bytes,
    )
