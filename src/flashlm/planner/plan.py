"""The planner: for one machine and one budget, the mode, the placement and the settings that cost least.

Candidates are costed with `estimate`, not chosen by rule; what the engine can do and what is allowed bound the search.
`naive` is never better than `hybrid` and is planned only where it is asked for. Mode `sparse` is a candidate where a
calibration has met its error budget, or where it is asked for. A mixture of experts has one mode, `experts`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flashlm.errors import BudgetError, ConfigError
from flashlm.memory.budget import Needs, Placement, place
from flashlm.memory.needs import DEFAULT_CONTEXT, measure_needs
from flashlm.pack.units import check_rows, dense_units
from flashlm.planner.bottleneck import would_help
from flashlm.planner.choices import Activations, ResolvedMode
from flashlm.planner.cost import TokenCost
from flashlm.planner.estimate import EXPERT_READS, DenseUse, dense_use, exact_token, hit_share, prompt_s, sparse_token
from flashlm.planner.plan_document import Plan
from flashlm.planner.rates import Rates, ReadSetting
from flashlm.planner.shape import ModelShape
from flashlm.storage.reader import DEFAULT_PIECE_BYTES, DEFAULT_QUEUE_DEPTH

GAPS = (0, 1, 2, 3, 4, 8)
STAGING_SLOTS = (
    3,
    4,
    6,
    8,
    12,
    16,
    20,
    24,
    28,
    32,
    48,
    64,
)  # blocks; two would leave nothing on the way while one is used
READ_NOISE = 0.1  # of single points of a profile
# Pieces in flight where whole blocks are streamed. A device shares itself among all that is in flight, so the block that
# is waited for takes as long as everything begun with it (docs/experiments.md).
STREAM_QUEUE_DEPTH = 64
PROMPT_TOKENS = 512  # of the prompt that is costed, or the context if that is shorter
ERROR_BAND = 0.25  # of predicted against measured tokens: the worst cell of 7 B shapes (docs/planner.md)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run, and its cost."""

    mode: ResolvedMode
    max_gap: int
    placement: Placement
    cost: TokenCost
    reads: ReadSetting


def model_needs(shape: ModelShape, context: int) -> Needs:
    """Return what the model must hold before anything is pinned, predictors aside, in a process like this one."""
    return measure_needs(shape.config, shape.units, shape.dtype, resident_bytes=shape.resident_bytes, context=context)


def make_plan(
    shape: ModelShape,
    rates: Rates,
    dram_bytes: int,
    *,
    context: int | None = None,
    mode: str = "auto",
    activations: Activations = "exact",
) -> Plan:
    """Return the cheapest plan under a budget.

    Args:
        shape: The model.
        rates: The machine.
        dram_bytes: Bound on the whole process.
        context: Tokens of the KV cache; None means `DEFAULT_CONTEXT`.
        mode: "auto" or the one mode to plan for.
        activations: What tokens are multiplied as with encoded weights: as the rates were taken.

    Raises:
        BudgetError: Below the floor; it says what is needed.
        ConfigError: Mode `sparse` of a model of whose sparsity nothing is known or whose rows can't be read one by one, or
            a mode that is not the model's.
    """
    context = context or DEFAULT_CONTEXT
    check_mode(shape, mode)
    check_activations(activations, shape.quantised, shape.name)
    needs = model_needs(shape, context)
    best = cheapest(shape, rates, dram_bytes, mode, needs)
    num_tokens = min(PROMPT_TOKENS, context)
    return Plan(
        source=shape.name,
        outline=shape.outline,
        dram_bytes=dram_bytes,
        context=context,
        mode=best.mode,
        activations=activations,
        is_exact=best.mode != "sparse" and activations == "exact",
        max_gap=best.max_gap,
        window=_window(shape, best.placement),
        hit_share=hit_share(shape, best.cost, best.placement),
        staging_bytes=best.placement.staging_bytes,
        piece_bytes=best.reads.piece_bytes,
        queue_depth=best.reads.queue_depth,
        token_s=best.cost.total_s,
        prompt_s=prompt_s(shape, best.placement, rates, num_tokens, num_tokens),
        prompt_tokens=num_tokens,
        io_s=best.cost.io_s,
        manage_s=best.cost.manage_s,
        compute_s=best.cost.compute_s,
        read_bytes=best.cost.read_bytes,
        num_reads=best.cost.num_reads,
        roofline_s=best.cost.roofline_s,
        resident_bytes=shape.resident_bytes + best.placement.needs.predictor_bytes,
        pinned_bytes=best.placement.pinned_bytes,
        cache_bytes=best.placement.cache_bytes,
        disk_bytes=shape.total_bytes,
        would_help=would_help(
            lambda rates, dram_bytes: cheapest(shape, rates, dram_bytes, best.mode, needs).cost.total_s,
            rates,
            dram_bytes,
        ),
    )


def check_activations(activations: Activations, quantised: Sequence[str], name: str) -> None:
    """Refuse activations of 8 bits where no weights take them.

    Args:
        activations: What was asked for.
        quantised: Encodings of the model's streamed weights that are not plain elements.
        name: Of the model or pack.

    Raises:
        ConfigError: There are none.
    """
    if activations != "exact" and not quantised:
        raise ConfigError(
            f"activations={activations!r}: all weights of {name} are plain, and multiplied as they are; leave activations"
            " out, or convert the model with --quantize q8_0"
        )


def check_mode(shape: ModelShape, mode: str) -> None:
    """Refuse a mode that is not the model's.

    Raises:
        ConfigError: Why not.
    """
    if shape.experts:
        if mode not in ("auto", "experts"):
            raise ConfigError(f"mode={mode!r}: {shape.name} is a mixture of experts; leave mode out, or choose experts")
    elif mode == "experts":
        raise ConfigError(f"mode='experts': {shape.name} has no experts; leave mode out")
    elif mode == "sparse" and shape.sparse is None:
        check_rows(shape.units, shape.name, "mode sparse")
        raise ConfigError(f"nothing is known of the sparsity of {shape.name}: convert it and run `flashlm calibrate`")


def check_fits(shape: ModelShape, dram_bytes: int, context: int | None) -> None:
    """Refuse a budget in which no mode has room. Needs no machine's rates.

    Raises:
        BudgetError: It says what is needed and for what.
    """
    context = context or DEFAULT_CONTEXT
    place(shape.units, model_needs(shape, context), dram_bytes, max_pinned_bytes=0)


def cheapest(shape: ModelShape, rates: Rates, dram_bytes: int, mode: str, needs: Needs) -> Candidate:
    """Return the candidate that costs least. Pure, as `candidates` is.

    Raises:
        BudgetError: None fits.
    """
    return min(candidates(shape, rates, dram_bytes, mode, needs), key=lambda each: each.cost.total_s)


def candidates(shape: ModelShape, rates: Rates, dram_bytes: int, mode: str, needs: Needs) -> Iterator[Candidate]:
    """Yield every way to run that is allowed.

    Args:
        shape: The model.
        rates: The machine.
        dram_bytes: Bound on the whole process.
        mode: "auto", or the one mode to look at.
        needs: What the model must hold beside what is placed, without predictors.

    Raises:
        BudgetError: None fits.
    """
    use = dense_use(shape)
    if shape.experts:
        placement = place(shape.units, needs, dram_bytes)
        cost = exact_token(shape, placement, rates, use, reads_ahead=True)
        yield Candidate(mode="experts", max_gap=0, placement=placement, cost=cost, reads=EXPERT_READS)
        return
    if mode in ("auto", "hybrid", "naive"):
        exact = list(_exact(shape, rates, dram_bytes, needs, use, mode))
        yield from exact
        if mode == "auto" and exact[0].placement.streamed_bytes == 0:
            return  # everything fits, exactly
    sparse = shape.sparse
    if sparse is None or not (mode == "sparse" or (mode == "auto" and sparse.has_passed)):
        return
    try:
        with_predictors = replace(needs, predictor_bytes=sparse.predictor_bytes)
        placement = place(shape.units, with_predictors, dram_bytes, uses=sparse.uses)
    except BudgetError:
        if mode == "sparse":
            raise
        return  # hybrid needs less
    reads = row_reads(rates, max(layout.row_stride_bytes for layout in shape.layouts))
    for max_gap in GAPS:
        cost = sparse_token(shape, sparse, placement, rates, max_gap=max_gap)
        yield Candidate(mode="sparse", max_gap=max_gap, placement=placement, cost=cost, reads=reads)


def _exact(
    shape: ModelShape, rates: Rates, dram_bytes: int, needs: Needs, use: DenseUse, mode: str
) -> Iterator[Candidate]:
    """Yield `hybrid` with every staging worth trying, or `naive`."""
    slot_bytes = max(unit.layout.block_stride_bytes for unit in dense_units(shape.units))
    reads = stream_reads(rates)
    if mode == "naive":
        placement = place(shape.units, needs, dram_bytes, max_pinned_bytes=0)
        cost = exact_token(shape, placement, rates, use, reads_ahead=False)
        yield Candidate(mode="naive", max_gap=0, placement=placement, cost=cost, reads=reads)
        return
    for num_slots in STAGING_SLOTS:
        placement = place(shape.units, needs, dram_bytes, staging_bytes=num_slots * slot_bytes)
        cost = exact_token(shape, placement, rates, use, reads_ahead=True)
        yield Candidate(mode="hybrid", max_gap=0, placement=placement, cost=cost, reads=reads)


def stream_reads(rates: Rates) -> ReadSetting:
    """Return how to read blocks: our default, unless the device was measured to be faster in another way."""
    default = ReadSetting(piece_bytes=DEFAULT_PIECE_BYTES, queue_depth=STREAM_QUEUE_DEPTH, gb_per_s=0.0)
    alike = [each for each in rates.stream_settings if each.piece_bytes == DEFAULT_PIECE_BYTES]
    return _clearly_better(default, alike, rates.stream_settings)


def row_reads(rates: Rates, row_bytes: int) -> ReadSetting:
    """Return how to read rows of a size: with our default depth, unless fewer in flight were measured to be faster."""
    default = ReadSetting(piece_bytes=DEFAULT_PIECE_BYTES, queue_depth=DEFAULT_QUEUE_DEPTH, gb_per_s=0.0)
    sizes = sorted({each.piece_bytes for each in rates.random_settings}, key=lambda size: abs(size - row_bytes))
    here = [each for each in rates.random_settings if each.piece_bytes in sizes[:1]]
    deepest = sorted(here, key=lambda each: each.queue_depth)[-1:]
    best = _clearly_better(default, deepest, here)
    return replace(best, piece_bytes=DEFAULT_PIECE_BYTES)


def _clearly_better(default: ReadSetting, alike: Sequence[ReadSetting], others: Sequence[ReadSetting]) -> ReadSetting:
    """Return the fastest of `others` where it beats all that are `alike` the default by more than noise."""
    best = max(others, key=lambda each: each.gb_per_s, default=default)
    known = max((each.gb_per_s for each in alike), default=0.0)
    return best if known and best.gb_per_s > known * (1 + READ_NOISE) else default


def _window(shape: ModelShape, placement: Placement) -> int:
    if not placement.rows or shape.sparse is None:
        return 0
    pairs = zip(shape.sparse.uses, placement.rows, strict=True)
    return int(statistics.median_low(use.window(capacity.num_slots) for use, capacity in pairs))
