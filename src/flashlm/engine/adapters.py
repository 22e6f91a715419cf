"""LoRA beside the rows: the low-rank part of a streamed layer, computed in its loop over blocks.

`expand(reduce(x))` is added to the gate and up products of the rows in the block before the activation, and the down-part's
share after. Rows may lie in another order than the checkpoint's neurons; adapters know neurons.

Sums are as those of the rows: where the row kernels run, a token gets the same bits alone and in a batch and whatever the
placement; the products of a prompt are cut as its blocks are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from flashlm.errors import ConfigError
from flashlm.rows import kernels


@dataclass(frozen=True, slots=True)
class Branch:
    """One adapter on one linear layer: `scaling * (expand · reduce · x + bias)`.

    Attributes:
        reduce: (rank, in_features).
        expand: (out_features, rank).
        bias: (out_features,), or None.
        scaling: Its factor.
        tokens: int64, which tokens of the pass it is for; None is all.
    """

    reduce: torch.Tensor
    expand: torch.Tensor
    bias: torch.Tensor | None
    scaling: float
    tokens: torch.Tensor | None


def read_branches(wrapper: Any, name: str, hidden_states: torch.Tensor) -> list[Branch]:
    """Return the adapters of a LoRA wrapper that act on a pass."""
    chosen = _names_by_sequence(wrapper, name)
    if wrapper.disable_adapters:
        return []
    tokens_of: dict[str, torch.Tensor | None] = dict.fromkeys(wrapper.active_adapters)
    if chosen is not None:
        if len(chosen) != len(hidden_states):
            raise ConfigError(f"adapter_names has {len(chosen)} names for {len(hidden_states)} sequences at {name}")
        numbers = torch.arange(hidden_states[..., 0].numel()).view(len(chosen), -1)
        tokens_of = {
            each: numbers[torch.tensor([other == each for other in chosen])].flatten() for each in dict.fromkeys(chosen)
        }
    found = []
    for adapter, tokens in tokens_of.items():
        if adapter not in wrapper.lora_A:
            continue
        reduce, expand = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
        bias = None if expand.bias is None else expand.bias.detach().to(torch.float32)
        found.append(
            Branch(reduce.weight.detach(), expand.weight.detach(), bias, float(wrapper.scaling[adapter]), tokens)
        )
    return found


def _names_by_sequence(wrapper: Any, name: str) -> list[str] | None:
    """Return the adapter of each sequence where peft mixes several in a batch: it says so by a hook on every wrapper."""
    names: list[str] | None = None
    for hook in wrapper._forward_pre_hooks.values():
        keywords = getattr(hook, "keywords", None) or {}
        if set(keywords) != {"adapter_names"}:
            raise ConfigError(f"a hook on the adapter of the streamed {name} would not be called: remove it")
        names = keywords["adapter_names"]
    return names


@dataclass(frozen=True, slots=True)
class AdapterPass:
    """The adapters of one layer in one pass.

    Attributes:
        branches: Of each role ("gate", "up", "down") those that act.
        is_fused: Whether "up" holds the gate's outputs first.
        order: int64 (num_rows,): which neuron each row is; None where rows lie in the checkpoint's order.
        num_tokens: Tokens of the pass.
    """

    branches: dict[str, list[Branch]]
    is_fused: bool
    order: torch.Tensor | None
    num_tokens: int

    def share(
        self, tokens: torch.Tensor, num_rows: int, *, by_rows: bool, where: torch.Tensor | slice = slice(None)
    ) -> AdapterShare:
        """Return the adapters for the tokens of the pass that go one way through its layer.

        Args:
            tokens: (num_tokens of the share, hidden_size).
            num_rows: Rows of the layer.
            by_rows: Sum as the row kernels do; else as matrix products.
            where: Which tokens of the pass they are.
        """
        numbers = torch.arange(self.num_tokens)[where]
        branches = {role: [_among(each, numbers) for each in some] for role, some in self.branches.items()}
        return AdapterShare(replace(self, branches=branches), tokens, num_rows, by_rows=by_rows)


def _among(branch: Branch, numbers: torch.Tensor) -> Branch:
    """Return `branch` with its tokens counted among `numbers`."""
    if branch.tokens is None:
        return branch
    return replace(branch, tokens=torch.isin(numbers, branch.tokens).nonzero().squeeze(1))


class AdapterShare:
    """The adapters of a layer for tokens that go one way through it; `AdapterPass.share` makes it."""

    def __init__(self, adapters: AdapterPass, tokens: torch.Tensor, num_rows: int, *, by_rows: bool) -> None:
        self._branches = adapters.branches
        self._is_fused = adapters.is_fused
        self._order = adapters.order
        self._num_rows = num_rows
        self._by_rows = by_rows
        self._hidden: torch.Tensor | None = None
        tokens = tokens.detach().to(torch.float32).contiguous()
        self._reduced = {
            role: [self._product(_some(tokens, each), each.reduce) * each.scaling for each in branches]
            for role, branches in self._branches.items()
            if role != "down"
        }
        down = self._branches.get("down", [])
        if down and by_rows:  # runs of blocks are cut as the placement wills, so their sum waits for all of them
            self._hidden = torch.zeros(len(tokens), num_rows, dtype=torch.float32)
        self._down = [
            torch.zeros(len(_some(tokens, each)), len(each.reduce), dtype=torch.float32)
            for each in (() if by_rows else down)
        ]

    def shift(self, up: torch.Tensor, gate: torch.Tensor | None, span: range) -> None:
        """Add the adapters' share to the products of rows `span`, fp32 (num_tokens, rows), in place."""
        self._add("up", up, span, first=self._num_rows if self._is_fused else 0)
        if gate is not None:
            self._add("up" if self._is_fused else "gate", gate, span, first=0)

    def collect(self, hidden: torch.Tensor, span: range) -> None:
        """Take the hidden activations of rows `span`, fp32 (num_tokens, rows)."""
        if self._hidden is not None:
            self._hidden[:, span.start : span.stop] = hidden
        for reduced, branch in zip(self._down, self._branches.get("down", []), strict=False):
            reduced += F.linear(_some(hidden, branch), branch.reduce[:, self._neurons(span)].to(torch.float32))

    def finish(self, output: torch.Tensor) -> None:
        """Add the down-projection's share to fp32 `output` (num_tokens, hidden_size)."""
        for index, branch in enumerate(self._branches.get("down", [])):
            if self._hidden is not None:
                hidden, order = _some(self._hidden, branch), self._order
                if order is not None:
                    in_order = torch.empty_like(hidden)
                    in_order[:, order] = hidden
                    hidden = in_order
                reduced = self._product(hidden, branch.reduce)
            else:
                reduced = self._down[index]
            self._expand(reduced * branch.scaling, branch, slice(None), output)

    def _add(self, role: str, target: torch.Tensor, span: range, *, first: int) -> None:
        neurons = self._neurons(span, first)
        for reduced, branch in zip(self._reduced.get(role, []), self._branches.get(role, []), strict=True):
            self._expand(reduced, branch, neurons, target)

    def _expand(
        self, reduced: torch.Tensor, branch: Branch, outputs: slice | torch.Tensor, target: torch.Tensor
    ) -> None:
        share = self._product(reduced, branch.expand[outputs])
        if branch.bias is not None:
            share += branch.bias[outputs] * branch.scaling
        if branch.tokens is None:
            target += share
        else:
            target[branch.tokens] += share

    def _neurons(self, span: range, first: int = 0) -> slice | torch.Tensor:
        order = self._order
        if order is None:
            return slice(first + span.start, first + span.stop)
        return order[span.start : span.stop] + first

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return x·weightᵀ in fp32; by our kernels a few tokens at a time, which give a token the same bits in any batch."""
        weight = weight.to(torch.float32).contiguous()
        if not self._by_rows:
            return F.linear(x, weight)
        pieces = torch.split(x.contiguous(), kernels.MAX_TOKENS)
        return torch.cat([kernels.linear(some, weight, None) for some in pieces])


def _some(values: torch.Tensor, branch: Branch) -> torch.Tensor:
    return values if branch.tokens is None else values[branch.tokens]
