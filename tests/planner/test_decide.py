"""What loading decides: pure, within the budget, never streaming more for more memory, never approximate by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flashlm.errors import BudgetError, ConfigError
from flashlm.memory.budget import MIN_STAGING_BLOCKS, Needs
from flashlm.memory.cache_plan import LayerUse
from flashlm.pack.units import Unit
from flashlm.planner.choices import ResolvedMode
from flashlm.planner.decide import Decision, decide
from flashlm.planner.plan import STAGING_SLOTS
from flashlm.planner.plan_use import PlannedReads, PlanUse
from flashlm.planner.rates import Rates
from flashlm.planner.settings import Settings
from flashlm.planner.shape import ModelShape, SparseShape
from flashlm.rows.layout import GATED, UNGATED, LayerLayout
from flashlm.sparsity.routing import LayerRouting, PolicyShares, Routing

MIB = 1 << 20
RATES = Rates(
    stream_gb_per_s={1 << 16: 0.5, 1 << 20: 2.0},
    random_gb_per_s={4096: 0.1, 16384: 0.5, 65536: 1.2},
    batch_latency_s=1e-4,
    memory_gb_per_s=25.0,
    matrix_gb_per_s=20.0,
    layer_overhead_s=3e-4,
)
EXACT_MODES: tuple[ResolvedMode, ...] = ("hybrid", "naive")


@dataclass(frozen=True)
class _Config:
    """As much of a transformers config as the cost model asks for."""

    vocab_size: int = 1000
    hidden_size: int = 64

    def get_text_config(self, decoder: bool) -> _Config:
        return self


def layouts(draw: st.DrawFn) -> tuple[LayerLayout, ...]:
    """Layers of one width, each with a number of rows of its own and blocks that may end ragged."""
    width, block_rows = draw(st.sampled_from([32, 64, 256])), draw(st.sampled_from([16, 48, 128]))
    parts, encoding = draw(st.sampled_from([GATED, UNGATED])), draw(st.sampled_from(["bf16", "fp32", "q8_0"]))
    rows = draw(st.lists(st.integers(1, 700), min_size=1, max_size=5))
    return tuple(
        LayerLayout(
            hidden_size=width, num_rows=each, parts=parts, encodings=(encoding,) * len(parts), block_rows=block_rows
        )
        for each in rows
    )


@st.composite
def shapes(draw: st.DrawFn, sparse: bool | None = None) -> ModelShape:
    """Models of feed-forward layers; `sparse`: whether they are calibrated, None draws it."""
    found = layouts(draw)
    is_calibrated = draw(st.booleans()) if sparse is None else sparse
    shares = sorted(draw(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4)))
    known = SparseShape(
        uses=tuple(LayerUse(num_rows=each.num_rows, use_curve=tuple(shares)) for each in found),
        active_shares=(shares[0],) * len(found),
        predictor_bytes=draw(st.integers(0, MIB)),
        increase=0.001,
        has_passed=draw(st.booleans()) if sparse is None else True,
        origin="drawn",
    )
    return ModelShape(
        name="drawn",
        model_type="llama",
        activation="silu",
        config=_Config(),
        dtype="bfloat16",
        units=tuple(Unit.dense("ffn", layout) for layout in found),
        resident_bytes=8 * MIB,
        matrix_bytes=4 * MIB,
        matrix_weights=2 * MIB,
        num_matrices=8,
        num_layers=len(found),
        is_pack=True,
        sparse=known if is_calibrated else None,
    )


NEEDS = Needs(process_bytes=30 * MIB, resident_bytes=8 * MIB, kv_cache_bytes=MIB, working_bytes=2 * MIB)
BUDGETS = st.integers(NEEDS.total_bytes, NEEDS.total_bytes + 24 * MIB)
PINS = st.none() | st.integers(0, 8 * MIB)
KNOWN_RATES = st.sampled_from([None, RATES])


def decided(shape: ModelShape, settings: Settings, rates: Rates | None) -> Decision:
    """The decision; draws that do not fit are left out."""
    try:
        return decide(shape, settings, rates, needs=NEEDS, default_dram_bytes=1 << 40)
    except BudgetError:
        assume(False)
        raise


@st.composite
def settings_of(draw: st.DrawFn, modes: tuple[Any, ...] = ("auto", "hybrid", "naive")) -> Settings:
    return Settings(
        dram_bytes=draw(BUDGETS),
        mode=draw(st.sampled_from(modes)),
        pin_bytes=draw(PINS),
        context=draw(st.integers(1, 64)),
    )


@given(shape=shapes(), settings=settings_of(), rates=KNOWN_RATES)
def test_it_stays_within_the_budget_and_the_pin(shape: ModelShape, settings: Settings, rates: Rates | None) -> None:
    decision = decided(shape, settings, rates)
    placement = decision.placement
    assert placement.planned_bytes <= (settings.dram_bytes or 0)
    assert placement.pinned_bytes <= (settings.pin_bytes if settings.pin_bytes is not None else placement.pinned_bytes)
    assert decision.context == settings.context
    assert settings.mode in ("auto", decision.mode)
    if decision.mode != "sparse":
        assert placement.pinned_bytes + placement.streamed_bytes == sum(layout.file_bytes for layout in shape.layouts)
    if decision.mode == "naive":
        assert placement.pinned_bytes == 0 or placement.streamed_bytes == 0


@given(shape=shapes(), settings=settings_of(), rates=KNOWN_RATES)
def test_the_same_gives_the_same(shape: ModelShape, settings: Settings, rates: Rates | None) -> None:
    assert decided(shape, settings, rates) == decided(replace(shape), replace(settings), rates)


@given(shape=shapes(sparse=False), settings=settings_of(), rates=KNOWN_RATES)
def test_it_is_never_approximate_without_a_calibration(
    shape: ModelShape, settings: Settings, rates: Rates | None
) -> None:
    assert decided(shape, settings, rates).mode in EXACT_MODES


@given(shape=shapes(), dram_bytes=BUDGETS, rates=KNOWN_RATES)
def test_auto_trusts_only_a_calibration_that_passed(shape: ModelShape, dram_bytes: int, rates: Rates | None) -> None:
    decision = decided(shape, Settings(dram_bytes=dram_bytes), rates)
    if decision.mode == "sparse":
        assert shape.sparse is not None
        assert shape.sparse.has_passed
        by_hybrid = decided(shape, Settings(dram_bytes=dram_bytes, mode="hybrid"), None)
        assert by_hybrid.placement.streamed_bytes > 0  # what fits is run exactly


@given(shape=shapes(sparse=False), budgets=st.tuples(BUDGETS, BUDGETS), mode=st.sampled_from(EXACT_MODES))
def test_more_memory_never_streams_more(shape: ModelShape, budgets: tuple[int, int], mode: ResolvedMode) -> None:
    """But for what the staging takes of it: a sixteenth, in whole blocks, and what is left of a block."""
    less, more = (
        decided(shape, Settings(dram_bytes=dram_bytes, mode=mode), None).placement for dram_bytes in sorted(budgets)
    )
    grown = max(more.num_slots - less.num_slots, 0)
    slack_bytes = (grown + 1) * more.slot_bytes if grown else 0
    assert more.streamed_bytes <= less.streamed_bytes + slack_bytes


@given(shape=shapes(sparse=False), budgets=st.tuples(BUDGETS, BUDGETS), num_slots=st.sampled_from(STAGING_SLOTS))
def test_with_a_plans_staging_more_memory_never_streams_more(
    shape: ModelShape, budgets: tuple[int, int], num_slots: int
) -> None:
    slot_bytes = max(layout.block_stride_bytes for layout in shape.layouts)
    least_bytes = NEEDS.total_bytes + num_slots * slot_bytes  # from where on the staging has room
    less, more = (
        decided(shape, with_plan(max(dram_bytes, least_bytes), num_slots * slot_bytes), RATES)
        for dram_bytes in sorted(budgets)
    )
    assert more.placement.streamed_bytes <= less.placement.streamed_bytes
    assert (more.queue_depth, more.piece_bytes) == (7, 8192)


def with_plan(dram_bytes: int, staging_bytes: int) -> Settings:
    reads = PlannedReads(max_gap=2, staging_bytes=staging_bytes, piece_bytes=8192, queue_depth=7)
    plan: Any = SimpleNamespace()
    used = PlanUse(path=None, plan=plan, notes=(), reads=reads)  # type: ignore[arg-type]
    return Settings(dram_bytes=dram_bytes, mode="hybrid", plan=used)


@given(shape=shapes(sparse=True), budgets=st.tuples(BUDGETS, BUDGETS))
def test_more_memory_never_holds_fewer_rows(shape: ModelShape, budgets: tuple[int, int]) -> None:
    less, more = (
        decided(shape, Settings(dram_bytes=dram_bytes, mode="sparse"), None) for dram_bytes in sorted(budgets)
    )
    assert less.mode == more.mode == "sparse"
    if more.placement.num_slots == less.placement.num_slots:
        assert more.placement.cache_bytes >= less.placement.cache_bytes


@given(budgets=st.tuples(BUDGETS, BUDGETS), num_experts=st.integers(2, 40), num_active=st.integers(1, 4))
def test_more_memory_never_holds_fewer_experts(budgets: tuple[int, int], num_experts: int, num_active: int) -> None:
    shape = mixture(num_experts, min(num_active, num_experts))
    found = []
    for dram_bytes in sorted(budgets):
        try:
            found.append(decided_experts(shape, Settings(dram_bytes=dram_bytes)))
        except BudgetError:
            assume(False)
    less, more = found
    assert sum(more.placement.experts) >= sum(less.placement.experts)
    assert more.placement.streamed_bytes <= less.placement.streamed_bytes
    assert more.placement.planned_bytes <= max(budgets)


def mixture(num_experts: int, num_active: int) -> ModelShape:
    """Three layers of experts."""
    layout = LayerLayout(
        hidden_size=64, num_rows=num_experts * 128, parts=GATED, encodings=("bf16",) * 3, block_rows=128
    )
    units = (Unit(kind="experts", layout=layout, num_active=num_active),) * 3
    return replace(ONE, name="experts", model_type="mixtral", activation="silu", units=units, num_layers=3)


def decided_experts(shape: ModelShape, settings: Settings, routing: Routing | None = None) -> Decision:
    return decide(shape, settings, None, needs=NEEDS, default_dram_bytes=1 << 40, routing=routing)


ONE = ModelShape(
    name="one",
    model_type="opt",
    activation="relu",
    config=_Config(),
    dtype="float32",
    units=(
        Unit.dense(
            "ffn",
            LayerLayout(hidden_size=64, num_rows=640, parts=UNGATED, encodings=("fp32",) * 2, block_rows=16),
        ),
    )
    * 2,
    resident_bytes=8 * MIB,
    matrix_bytes=4 * MIB,
    matrix_weights=MIB,
    num_layers=2,
    is_pack=True,
)
TIGHT = NEEDS.total_bytes + 300_000


def test_below_the_floor_it_says_what_is_needed() -> None:
    slot_bytes = ONE.layouts[0].block_stride_bytes
    with pytest.raises(BudgetError) as caught:
        decide(ONE, Settings(dram_bytes=NEEDS.total_bytes), None, needs=NEEDS, default_dram_bytes=1)
    assert caught.value.needed_bytes == NEEDS.total_bytes + MIN_STAGING_BLOCKS * slot_bytes


def test_without_a_budget_the_machines_is_taken() -> None:
    decision = decide(ONE, Settings(), None, needs=NEEDS, default_dram_bytes=TIGHT)
    assert decision.placement.dram_bytes == TIGHT
    assert decision.placement.streamed_bytes > 0


def test_sparse_needs_to_know_the_rows() -> None:
    with pytest.raises(ConfigError, match="nothing is known of the sparsity of one"):
        decide(ONE, Settings(dram_bytes=TIGHT, mode="sparse"), None, needs=NEEDS, default_dram_bytes=1)


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        (Settings(dram_bytes=TIGHT, pin_bytes=100_000), ()),
        (Settings(dram_bytes=TIGHT, pin_bytes=0, mode="naive"), ()),
        (
            Settings(dram_bytes=TIGHT, pin_bytes=100_000, mode="naive"),
            ("pin has no effect in mode naive: nothing is pinned",),
        ),
    ],
)
def test_a_pin_without_effect_is_named(settings: Settings, notes: tuple[str, ...]) -> None:
    assert decide(ONE, settings, None, needs=NEEDS, default_dram_bytes=1).notes == notes


def test_a_policy_without_effect_is_named_and_a_small_cache_too() -> None:
    shape = mixture(8, 2)
    ample = decided_experts(shape, Settings(dram_bytes=1 << 40, expert_policy="lfu"))
    assert ample.notes == ("expert_policy=lfu has no effect: all experts are held",)
    assert decided_experts(shape, Settings(dram_bytes=1 << 40)).notes == ()
    small = decided_experts(shape, Settings(dram_bytes=1 << 40, pin_bytes=0))
    (note,) = small.notes
    assert "the expert cache holds 6 experts, a token uses 6" in note


def test_auto_takes_the_policy_that_a_calibration_found_best() -> None:
    shape = mixture(8, 2)
    replays = (PolicyShares(cache_share=0.5, lru=0.5, lfu=0.7, pinned=0.6, best="lfu"),)
    layers = tuple(LayerRouting(counts=tuple(range(8))) for _ in shape.experts)
    routing = Routing(
        fingerprint="0" * 16, text="a text", num_tokens=9, num_replayed_tokens=9, layers=layers, replays=replays
    )
    settings = Settings(dram_bytes=1 << 40, pin_bytes=12 * shape.experts[0].layout.block_stride_bytes)
    known, unknown = decided_experts(shape, settings, routing), decided_experts(shape, settings)
    assert known.policy is not None
    assert unknown.policy is not None
    assert (known.policy.name, unknown.policy.name) == ("lfu", "lru")
    with pytest.raises(ConfigError, match="how they are used is not known"):
        decided_experts(shape, replace(settings, expert_policy="pinned"))
