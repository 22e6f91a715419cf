"""Streamed experts of every mixture-of-experts family, as one function of transformers' experts interface.

The family's own experts module stays in the model, with its activation, gate, biases and norm, but without its two large
weights; the interface (`config._experts_implementation`) leads its calls here. Rows of an expert come from an `ExpertStore`.
The order of summation depends on nothing that the cache does:

* tokens that are decoded or verified, and short prompts, take the row kernels, in tiles of what those take at once: a token
  gets the same bits alone and in a batch of any size. In a longer prompt an expert with up to `MAX_KERNEL_TOKENS` tokens
  takes them too, one with more takes matrix products: exact both, but there a token's last bits depend on its company;
* a token's experts are added up in fp32 in ascending order of their numbers, whatever landed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from flashlm.engine.expert_store import ExpertStore
from flashlm.engine.forward_pass import Where, check_wanted, split_tokens, tiles
from flashlm.engine.guards import check_hidden_states
from flashlm.errors import ConfigError
from flashlm.memory.needs import rows_per_product
from flashlm.rows import kernels
from flashlm.rows.layout import LayerLayout, round_up
from flashlm.rows.neurons import accumulate_blocks, block_at, neurons_at, operand, project_blocks
from flashlm.rows.products import BlockGemm
from flashlm.transformers_seam import ALL_EXPERTS_FUNCTIONS, apply_gate

IMPLEMENTATION = "flashlm"
MAX_KERNEL_TOKENS = kernels.MAX_TOKENS
WHOLE_VECTORS = 64  # elements that torch's vector loops take at once, at most


class ExpertObserver(Protocol):
    """Looks on while experts run: for calibration."""

    def routed(self, layer: int, index: torch.Tensor) -> None:
        """Take the choices of a pass: (num_tokens, experts per token), integers, as the router ranked them."""

    def activated(self, layer: int, activations: torch.Tensor) -> None:
        """Take one expert's inner activations, fp32 (its tokens, rows), some rows at a time; they are not to be changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundExperts:
    """What an experts module runs on; its attribute `flash_experts`.

    Attributes:
        layer: Index of the layer in the store.
        layout: Geometry of its experts: block e is expert e.
        store: Gives experts.
        gemm: Products for many tokens.
        int8: Round tokens to 8 bits for their products with encoded weights.
        observer: Looks on; None in normal use.
    """

    layer: int
    layout: LayerLayout
    store: ExpertStore
    gemm: BlockGemm
    int8: bool
    observer: ExpertObserver | None = None


@dataclass(frozen=True, slots=True)
class _Routing:
    """Which tokens go to which expert.

    Attributes:
        experts: Experts that any token needs, ascending.
        by_recency: The same, by the last token that needs them.
        tokens: int64, of each expert its tokens, ascending.
        weights: fp32 (num_tokens of the expert, 1), of each expert.
    """

    experts: list[int]
    by_recency: list[int]
    tokens: dict[int, torch.Tensor]
    weights: dict[int, torch.Tensor]


def flash_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of every token's experts; the interface's function.

    Args:
        module: The experts module.
        hidden_states: (..., hidden_size), any floating dtype.
        top_k_index: (num_tokens, experts per token), integers; numbers that are no expert's count for nothing.
        top_k_weights: The same shape.

    Returns:
        As `hidden_states`.

    Raises:
        ConfigError: The module is not connected to a pack, a gradient is asked for, or an input is on another device or of
            a dtype that experts don't have.
        StorageError: An expert can't be read.
    """
    bound = getattr(module, "flash_experts", None)
    if not isinstance(bound, BoundExperts):
        raise ConfigError("these experts have no weights yet: load the pack with flashlm.load or from_pretrained")
    check_wanted()
    check_hidden_states(module, hidden_states)
    if not (top_k_index.is_cpu and top_k_weights.is_cpu):
        raise ConfigError(f"the routing is on {top_k_index.device}, but a pack computes on the CPU: move it there")
    tokens = hidden_states.detach().reshape(-1, bound.layout.hidden_size).to(torch.float32).contiguous()
    if bound.observer is not None:
        bound.observer.routed(bound.layer, top_k_index.reshape(len(tokens), -1))
    chosen = top_k_index.reshape(-1).tolist() if len(tokens) == 1 else []
    if chosen and len(set(chosen)) == len(chosen):
        output = _run_token(module, bound, tokens, chosen, top_k_weights)
    else:
        many = split_tokens(hidden_states.shape, has_predictor=False).many
        output = _run_tokens(module, bound, tokens, top_k_index, top_k_weights, _is_long(many, len(tokens)))
    return output.to(hidden_states.dtype).reshape(hidden_states.shape)


def _run_token(
    module: nn.Module, bound: BoundExperts, token: torch.Tensor, chosen: list[int], weights: torch.Tensor
) -> torch.Tensor:
    """Return one token's sum, fp32 (1, hidden_size): of experts that are all available now."""
    places = {expert: place for place, expert in enumerate(chosen) if 0 <= expert < bound.layout.num_blocks}
    weights = weights.detach().reshape(-1, 1).to(torch.float32)
    shares: dict[int, torch.Tensor] = {}
    with bound.store.experts(bound.layer, sorted(places), list(places), held_first=True) as groups:
        for group in groups:
            weighted = _run_together(module, bound, group, token) * weights[[places[expert] for expert, _ in group]]
            shares.update(zip((expert for expert, _ in group), weighted, strict=True))
    output = torch.zeros(token.shape, dtype=torch.float32)
    for expert in sorted(shares):
        output += shares[expert]
    return output


def _is_long(many: Where, num_tokens: int) -> torch.Tensor | None:
    """Return which of the tokens, bool (num_tokens,), belong to sequences that may take matrix products; None: none."""
    if many is None:
        return None
    is_long = torch.zeros(num_tokens, dtype=torch.bool)
    is_long[many] = True
    return is_long


def _run_tokens(
    module: nn.Module,
    bound: BoundExperts,
    tokens: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    is_long: torch.Tensor | None,
) -> torch.Tensor:
    """Return the sums of several tokens, fp32 (num_tokens, hidden_size): one expert after the other."""
    routing = _route(index, weights, len(tokens), bound.layout.num_blocks)
    output = torch.zeros(tokens.shape, dtype=torch.float32)
    is_small = len(tokens) <= MAX_KERNEL_TOKENS
    shares: dict[int, torch.Tensor] = {}
    experts = bound.store.experts(bound.layer, routing.experts, routing.by_recency, held_first=is_small)
    with experts as groups, nullcontext() if is_small else bound.gemm.held(bound.layout):
        for group in groups:
            for expert, place in group:
                mine = routing.tokens[expert]
                share = _run_expert(
                    module, bound, expert, place, tokens[mine], None if is_long is None else is_long[mine]
                )
                if is_small:
                    shares[expert] = share
                else:  # comes in ascending order
                    output.index_add_(0, routing.tokens[expert], share.mul_(routing.weights[expert]))
    for expert in sorted(shares):
        output.index_add_(0, routing.tokens[expert], shares[expert].mul_(routing.weights[expert]))
    return output


def _route(index: torch.Tensor, weights: torch.Tensor, num_tokens: int, num_experts: int) -> _Routing:
    flat = index.reshape(num_tokens, -1)
    num_active = flat.shape[1]
    order = flat.reshape(-1).argsort(stable=True)
    numbers, counts = flat.reshape(-1)[order].unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    sorted_tokens = order // max(num_active, 1)
    sorted_weights = weights.detach().reshape(-1)[order].to(torch.float32).unsqueeze(1)
    tokens: dict[int, torch.Tensor] = {}
    shares: dict[int, torch.Tensor] = {}
    last: dict[int, int] = {}
    start = 0
    for expert, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        stop = start + count
        if 0 <= expert < num_experts:
            tokens[expert], shares[expert] = sorted_tokens[start:stop], sorted_weights[start:stop]
            last[expert] = int(order[stop - 1])
        start = stop
    return _Routing(list(tokens), sorted(last, key=last.__getitem__), tokens, shares)


def _run_expert(
    module: nn.Module,
    bound: BoundExperts,
    expert: int,
    place: kernels.SlotRef,
    tokens: torch.Tensor,
    is_long: torch.Tensor | None,
) -> torch.Tensor:
    """Return one expert's output for some tokens: fp32 (num_tokens, hidden_size) in and out."""
    biases = _biases(module, expert)
    output = torch.zeros(tokens.shape, dtype=torch.float32)
    num_long = 0 if is_long is None or len(tokens) <= MAX_KERNEL_TOKENS else int(is_long.sum())
    if is_long is None or num_long <= MAX_KERNEL_TOKENS:
        _add_by_rows(module, bound, place, biases, tokens, output)
    elif num_long == len(tokens):
        _add_by_products(module, bound, place, biases, tokens, output)
    else:  # a long prompt and others side by side
        for is_mine, add in ((is_long, _add_by_products), (~is_long, _add_by_rows)):
            part = output[is_mine]
            add(module, bound, place, biases, tokens[is_mine], part)
            output[is_mine] = part
    return _finish(module, output, [] if biases.outer is None else [biases.outer])


def _add_by_rows(
    module: nn.Module,
    bound: BoundExperts,
    place: kernels.SlotRef,
    biases: _Biases,
    tokens: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Add an expert's products, without outer bias and norm, by row kernels: a token's bits whatever its company."""
    layout = bound.layout
    num_rows = layout.block_rows
    neurons, width = neurons_at(layout, place, num_rows, int8=bound.int8), round_up(num_rows, WHOLE_VECTORS)
    for tile in tiles(len(tokens)):
        some = tokens if len(tokens) <= MAX_KERNEL_TOKENS else tokens[tile]
        x = operand(some, layout.encodings[:-1], int8=bound.int8)
        parts = [torch.zeros(len(some), width, dtype=torch.float32) for _ in range(layout.num_parts - 1)]
        for number, part in enumerate(parts):
            out = part if width == num_rows else part[:, :num_rows]
            neurons.project(x, number, out, biases.inner[number] if biases.inner else None)
        neurons.accumulate(_activate_together(module, bound, parts, num_rows), output[tile])


def _add_by_products(
    module: nn.Module,
    bound: BoundExperts,
    place: kernels.SlotRef,
    biases: _Biases,
    tokens: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Add an expert's products, without outer bias and norm, by matrix products: for many tokens at once."""
    layout = bound.layout
    prepared = bound.gemm.prepare(tokens, layout)
    step = layout.block_rows if bound.gemm.rounds(layout) else rows_per_product(layout)
    for first in range(0, layout.block_rows, step):
        num_rows = min(step, layout.block_rows - first)
        span = slice(first, first + num_rows)
        gate, up, down = bound.gemm.parts(layout, place, layout.block_rows, range(first, first + num_rows))
        inner = [up] if gate is None else [gate, up]
        parts = [
            bound.gemm.project(prepared, part, biases.inner[number][span] if biases.inner else None)
            for number, part in enumerate(inner)
        ]
        bound.gemm.accumulate(_activate(module, bound, parts, num_rows), down, output)


def _run_together(
    module: nn.Module, bound: BoundExperts, group: list[tuple[int, kernels.SlotRef]], token: torch.Tensor
) -> torch.Tensor:
    """Return the outputs of several experts for one token, fp32 (number of experts, hidden_size); the bits of `_run_expert`.

    Alone, an expert's calls from Python take as long as its weights do in small models.
    """
    layout = bound.layout
    blocks = [block_at(layout, place, layout.block_rows, int8=bound.int8) for _, place in group]
    x = operand(token, layout.encodings[:-1], int8=bound.int8)
    biases = [_biases(module, expert) for expert, _ in group]
    parts = [torch.empty(len(group), layout.block_rows, dtype=torch.float32) for _ in range(layout.num_parts - 1)]
    for number, part in enumerate(parts):
        project_blocks(x, blocks, number, part, [each.inner[number] for each in biases if each.inner])
    output = torch.zeros(len(group), layout.hidden_size, dtype=torch.float32)
    missing = -layout.block_rows % WHOLE_VECTORS
    parts = [F.pad(part, (0, missing)) for part in parts] if missing else parts
    accumulate_blocks(_activate_together(module, bound, parts, layout.block_rows).contiguous(), blocks, output)
    return _finish(module, output, [each.outer for each in biases if each.outer is not None])


def _activate_together(module: Any, bound: BoundExperts, parts: list[torch.Tensor], num_rows: int) -> torch.Tensor:
    """Return `_activate` of several tokens' or experts' parts, each (one or the other, rows), with the bits of one alone.

    torch computes what its vector loops leave over in another way, so that an element's bits depend on where it lies:
    the parts come filled up to `WHOLE_VECTORS`, of which nothing is left over.
    """
    with kernels.one_torch_thread():
        return _activate(module, bound, parts, num_rows)


def _finish(module: nn.Module, output: torch.Tensor, biases: list[torch.Tensor]) -> torch.Tensor:
    """Return outputs (tokens or experts, hidden_size) with their biases, one for all or one for each, and normed."""
    if biases:
        output += torch.stack(biases)
    if getattr(module, "has_post_expert_norm", False):
        norm: Callable[[torch.Tensor], torch.Tensor] = module.post_expert_norm  # type: ignore[assignment]
        output = norm(output).to(torch.float32)
    return output


@dataclass(frozen=True, slots=True)
class _Biases:
    """An expert's biases in fp32: of each part that the input meets (num_rows,), and of the output (hidden_size,)."""

    inner: list[torch.Tensor]
    outer: torch.Tensor | None


def _biases(module: Any, expert: int) -> _Biases:
    if not module.has_bias:
        return _Biases([], None)
    outer = module.down_proj_bias[expert].detach().to(torch.float32)
    if not module.has_gate:
        return _Biases([module.up_proj_bias[expert].detach().to(torch.float32).contiguous()], outer)
    both = module.gate_up_proj_bias[expert].detach().to(torch.float32)
    gate, up = both.chunk(2) if module.is_concatenated else (both[0::2], both[1::2])
    return _Biases([gate.contiguous(), up.contiguous()], outer)


def _activate(module: Any, bound: BoundExperts, parts: list[torch.Tensor], num_rows: int) -> torch.Tensor:
    """Return the hidden activations of gate and up, or of up alone, by the module's own way.

    Args:
        module: The experts module.
        bound: What it runs on.
        parts: fp32 (num_tokens, num_rows or more), of which only the first `num_rows` count.
        num_rows: Rows.

    Returns:
        fp32 (num_tokens, num_rows), any token stride.
    """
    activated: torch.Tensor
    if module.has_gate:
        gate, up = parts
        joined = torch.cat([gate, up], dim=1) if module.is_concatenated else torch.stack([gate, up], dim=2).flatten(1)
        activated = apply_gate(module, joined).contiguous()
    else:
        activated = module.act_fn(parts[0])
    if activated.shape[1] > num_rows:
        activated = activated[:, :num_rows]
    if bound.observer is not None:
        bound.observer.activated(bound.layer, activated)
    return activated


@contextmanager
def observed(model: nn.Module, observer: ExpertObserver) -> Iterator[None]:
    """Call `observer` in every layer of experts of a loaded pack, within the context."""
    modules: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "flash_experts", None), BoundExperts)
    ]
    before = [module.flash_experts for module in modules]
    try:
        for module in modules:
            module.flash_experts = replace(module.flash_experts, observer=observer)
        yield
    finally:
        for module, bound in zip(modules, before, strict=True):
            module.flash_experts = bound


def register() -> None:
    """Make the implementation known to transformers; calling it again does nothing."""
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, flash_experts_forward)


register()
