"""What loading decides, all of it, before anything is read: mode, placement, reads, gaps, cache policy.

`decide` is pure: a model's shape, the settings, the machine's rates (None where the device was never probed) and what the
process must hold give a `Decision`; the same always give the same. It asks no clock, no file and no kernel, and knows
nothing of running models; `engine/runtime.py` carries the decision out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flashlm.errors import BudgetError, ConfigError
from flashlm.memory.budget import Needs, Placement, is_close_to_floor, place
from flashlm.memory.expert_policy import CachePolicy, make_policy
from flashlm.memory.needs import DEFAULT_CONTEXT
from flashlm.planner.choices import Activations, ResolvedMode
from flashlm.planner.estimate import EXPERT_READS
from flashlm.planner.plan import STREAM_QUEUE_DEPTH, cheapest
from flashlm.planner.rates import Rates
from flashlm.planner.settings import Settings
from flashlm.planner.shape import ModelShape
from flashlm.sparsity.routing import Routing
from flashlm.storage.reader import DEFAULT_PIECE_BYTES, DEFAULT_QUEUE_DEPTH


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How a pack will run.

    Attributes:
        mode: The mode.
        context: Tokens that the KV cache may hold, of all sequences and beams together.
        activations: What tokens are multiplied as with encoded weights.
        placement: Where every block or expert lives.
        piece_bytes, queue_depth: Size of a read and reads in flight.
        max_gap: Rows between two missing ones that are read through (mode `sparse`).
        policy: How the expert cache is run (mode `experts`).
        notes: What was asked for and has no effect here, and what the user should know; one sentence each.
    """

    mode: ResolvedMode
    context: int
    activations: Activations
    placement: Placement
    piece_bytes: int
    queue_depth: int
    max_gap: int = 0
    policy: CachePolicy | None = None
    notes: tuple[str, ...] = ()


def decide(
    shape: ModelShape,
    settings: Settings,
    rates: Rates | None,
    *,
    needs: Needs,
    default_dram_bytes: int,
    routing: Routing | None = None,
) -> Decision:
    """Return how a model runs.

    A mixture of experts has one mode. Of the others, with rates the cheapest way by the cost model is taken, within what
    the settings leave open. Without, `auto` is `hybrid`, which is exact and never slower than `naive`, unless the model does
    not fit and a calibration has met its error budget. A plan's reads go before both.

    Args:
        shape: The model, with what its calibration says.
        settings: What the user chose.
        rates: What the pack's device and the machine can do; None where that is not known.
        needs: What the process must hold beside what is placed, at the settings' context and without predictors.
        default_dram_bytes: The budget where the settings state none.
        routing: How a calibration's text used experts; None without one.

    Raises:
        BudgetError: It does not fit; it says what is needed and for what.
        ConfigError: Mode `sparse` of a model of whose sparsity nothing is known, or policy `pinned` without a calibration.
    """
    dram_bytes = settings.dram_bytes or default_dram_bytes
    if shape.experts:
        return _decide_experts(shape, settings, needs, dram_bytes, routing)
    planned = settings.reads
    placement = place(
        shape.units,
        needs,
        dram_bytes,
        max_pinned_bytes=settings.max_pinned_bytes,
        staging_bytes=None if planned is None else planned.staging_bytes,
    )
    if planned is None and rates is not None:
        best = cheapest(shape, rates, dram_bytes, settings.mode, needs)
        mode, max_gap = best.mode, best.max_gap
        piece_bytes, queue_depth = best.reads.piece_bytes, best.reads.queue_depth
        placement = best.placement if settings.pin_bytes is None else placement
    else:
        mode = _mode_by_rule(shape, settings, fits=placement.streamed_bytes == 0)
        default_depth = DEFAULT_QUEUE_DEPTH if mode == "sparse" else STREAM_QUEUE_DEPTH
        max_gap = 0 if planned is None else planned.max_gap
        piece_bytes = DEFAULT_PIECE_BYTES if planned is None else planned.piece_bytes
        queue_depth = default_depth if planned is None else planned.queue_depth
    if mode == "sparse":
        if shape.sparse is None:
            raise ConfigError(f"mode='sparse': nothing is known of the sparsity of {shape.name}; calibrate it first")
        with_predictors = replace(needs, predictor_bytes=shape.sparse.predictor_bytes)
        try:
            placement = place(shape.units, with_predictors, dram_bytes, uses=shape.sparse.uses)
        except BudgetError:
            if settings.mode == "sparse":
                raise
            mode = "hybrid"  # which needs less
    return Decision(
        mode=mode,
        context=settings.context or DEFAULT_CONTEXT,
        activations=settings.activations,
        placement=placement,
        piece_bytes=piece_bytes,
        queue_depth=queue_depth,
        max_gap=max_gap,
        notes=_unused_pin(settings, mode),
    )


def _decide_experts(
    shape: ModelShape, settings: Settings, needs: Needs, dram_bytes: int, routing: Routing | None
) -> Decision:
    """Return how a mixture of experts runs: as many experts as fit, and what its calibration found best for the cache."""
    placement = place(shape.units, needs, dram_bytes, max_pinned_bytes=settings.max_pinned_bytes)
    num_held, num_experts = sum(placement.experts), sum(unit.num_blocks for unit in shape.experts)
    num_active = [unit.num_active for unit in shape.experts]
    name = settings.expert_policy
    if name == "auto":
        name = "lru" if routing is None else routing.best_policy(num_held / num_experts)
    counts = None if routing is None else routing.counts
    notes = []
    if settings.expert_policy != "auto" and num_held == num_experts:
        notes.append(f"expert_policy={settings.expert_policy} has no effect: all experts are held")
    if is_close_to_floor(shape.units, placement):
        notes.append(
            f"the expert cache holds {num_held} experts, a token uses {sum(num_active)}: next to nothing will be found in"
            " it; raise dram"
        )
    planned = settings.reads
    return Decision(
        mode="experts",
        context=settings.context or DEFAULT_CONTEXT,
        activations=settings.activations,
        placement=placement,
        piece_bytes=EXPERT_READS.piece_bytes if planned is None else planned.piece_bytes,
        queue_depth=EXPERT_READS.queue_depth if planned is None else planned.queue_depth,
        policy=make_policy(name, placement.experts, num_active, counts),
        notes=tuple(notes),
    )


def _mode_by_rule(shape: ModelShape, settings: Settings, *, fits: bool) -> ResolvedMode:
    if settings.mode != "auto":
        return settings.mode
    return "sparse" if shape.sparse is not None and shape.sparse.has_passed and not fits else "hybrid"


def _unused_pin(settings: Settings, mode: ResolvedMode) -> tuple[str, ...]:
    if not settings.pin_bytes or mode == "hybrid":
        return ()
    instead = "rows are held in the neuron cache" if mode == "sparse" else "nothing is pinned"
    return (f"pin has no effect in mode {mode}: {instead}",)
