"""Plans of mixtures of experts: from configs and packs, under budgets, against arithmetic by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashlm
from flashlm.errors import BudgetError, ConfigError
from flashlm.memory.budget import place
from flashlm.pack.manifest import read_manifest
from flashlm.planner.cost import Overlap
from flashlm.planner.estimate import dense_use, exact_token
from flashlm.planner.machine import rates_of
from flashlm.planner.plan import make_plan, model_needs
from flashlm.planner.plan_document import load_plan, save_plan
from flashlm.planner.rates import Rates, ReadSetting
from flashlm.planner.settings import make_settings
from flashlm.planner.shape import UNIFORM, HitCurve, ModelShape, read_shape
from flashlm.probe.experts import expert_overheads_s
from flashlm.sparsity.calibration_document import fingerprint
from flashlm.sparsity.routing import LayerRouting, PolicyShares, Routing, write_routing
from tests.engine.conftest import TinyPack
from tests.models import save_checkpoint
from tests.planner.profiles import make_profile

GIB = 1 << 30
RATES = rates_of(make_profile(), "bfloat16")
BARE = Rates(
    stream_gb_per_s={1 << 20: 2.0},
    random_gb_per_s={4096: 0.1},
    memory_gb_per_s=20.0,
    matrix_gb_per_s=20.0,
    expert_gb_per_s=16.0,
    random_settings=(
        ReadSetting(piece_bytes=1 << 20, queue_depth=32, gb_per_s=1.6),
        ReadSetting(piece_bytes=1 << 16, queue_depth=32, gb_per_s=0.9),
    ),
    overlap=Overlap(),
)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """OLMoE-1B-7B's shape, from a config alone."""
    folder = tmp_path_factory.mktemp("olmoe")
    config = {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts_per_tok": 8, "vocab_size": 50304,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shape = read_shape(folder)
    return shape


def test_a_config_alone_gives_the_published_sizes(olmoe: ModelShape) -> None:
    linears = 16 * 4 * 2048 * 2048 + 2 * 50304 * 2048  # embeddings too
    assert olmoe.streamed_bytes == (16 * 64 * 3 * 1024 * 2048 + linears) * 2
    assert olmoe.total_bytes / 2 == pytest.approx(6.92e9, rel=0.01)  # parameters
    assert {(use.num_blocks, use.num_active) for use in olmoe.experts} == {(64, 8)}
    assert olmoe.num_layers == 16


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "mixtral"])
def test_a_config_plans_what_its_pack_will_be(family: str, tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", family)
    shape, pack = read_shape(tmp_path / "source", dtype="fp32"), read_shape(tiny_pack(family).pack)
    for name in ("units", "matrix_bytes", "num_matrices", "num_layers", "dtype", "streamed_bytes"):
        assert getattr(shape, name) == getattr(pack, name)
    assert shape.resident_bytes == pytest.approx(pack.resident_bytes, rel=0.2)  # buffers and a header


@given(points=st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(0, 1)), max_size=4), share=st.floats(0, 1))
def test_hits_lie_on_the_line_between_points(points: list[tuple[float, float]], share: float) -> None:
    curve = HitCurve(points=tuple(sorted({round(x, 2): y for x, y in points}.items())), origin="made up")
    assert 0.0 <= curve.hit_share(share) <= 1.0
    for held, found in curve.points:
        assert curve.hit_share(held) == pytest.approx(found)
    assert UNIFORM.hit_share(share) == pytest.approx(share)


def test_a_token_by_hand(olmoe: ModelShape) -> None:
    plan_bytes = make_plan(olmoe, BARE, 32 * GIB, context=64)
    expert_bytes = 3 * 1024 * 2048 * 2
    products_s = 16 * 8 * expert_bytes / 16e9
    assert plan_bytes.hit_share == 1.0
    assert plan_bytes.token_s == pytest.approx(products_s + olmoe.matrix_bytes / 20e9)
    assert plan_bytes.roofline_s == pytest.approx((16 * 8 * expert_bytes + olmoe.matrix_bytes) / 20e9)

    never = replace(olmoe, hits=HitCurve(points=((0.999, 0.0),), origin="nothing is found"))
    plan = make_plan(never, BARE, 6 * GIB, context=64)
    assert plan.num_reads == pytest.approx(16 * 8)
    # eight reads, beside which seven products find room, and the last one's product
    layer_s = 8 * expert_bytes / 1.6e9 + expert_bytes / 16e9
    assert plan.token_s == pytest.approx(16 * layer_s + olmoe.matrix_bytes / 20e9)
    assert plan.roofline_s == pytest.approx(16 * 8 * expert_bytes / 1.6e9)


@given(dram_bytes=st.integers(6 * GIB, 20 * GIB), more_bytes=st.integers(0, 4 * GIB))
def test_more_dram_is_never_slower(olmoe: ModelShape, dram_bytes: int, more_bytes: int) -> None:
    less, more = (make_plan(olmoe, RATES, each, context=64) for each in (dram_bytes, dram_bytes + more_bytes))
    assert more.token_s <= less.token_s * (1 + 1e-9)
    assert more.prompt_s <= less.prompt_s * (1 + 1e-9)
    assert more.roofline_s <= more.token_s


def test_layers_that_miss_give_nothing_to_those_that_wait(olmoe: ModelShape) -> None:
    """The mean of what layers take is more than what a layer with the mean of misses takes."""
    slow_products = replace(BARE, expert_gb_per_s=1.6)  # as slow as reading, so that one hides the other
    half = replace(olmoe, hits=HitCurve(points=((0.01, 0.5), (0.99, 0.5)), origin="half"))
    plan = make_plan(half, slow_products, 6 * GIB, context=64)
    expert_s = 3 * 1024 * 2048 * 2 / 1.6e9
    assert plan.num_reads == pytest.approx(64)
    assert plan.token_s > 16 * 8 * expert_s + olmoe.matrix_bytes / 20e9


def test_a_prompt_reads_each_needed_expert_once(olmoe: ModelShape) -> None:
    fast = replace(BARE, gemm_gflop_per_s=1e9, memory_gb_per_s=1e9)
    plan = make_plan(olmoe, fast, 6 * GIB, context=2048)
    table_bytes = 50304 * 2048 * 2  # of embeddings: a prompt reads rows of it
    assert plan.prompt_tokens == 512
    assert plan.prompt_s == pytest.approx(
        (olmoe.streamed_bytes - table_bytes - plan.cache_bytes - plan.pinned_bytes) / 1.6e9, rel=0.01
    )


def test_the_plan_is_what_loading_does(tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> None:
    pack = tiny_pack("olmoe").pack
    shape = read_shape(pack)
    with pytest.raises(BudgetError) as caught:
        make_plan(shape, RATES, 1 << 20, context=64)
    dram_bytes = caught.value.needed_bytes + (32 << 20)
    plan = make_plan(shape, RATES, dram_bytes, context=64)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    settings = make_settings(plan=tmp_path / "plan.json")
    assert settings.reads is not None
    assert (settings.mode, settings.reads.queue_depth, settings.reads.piece_bytes) == ("experts", 64, 1 << 20)
    model = flashlm.load(pack, plan=tmp_path / "plan.json")
    assert model.flash.placement.cache_bytes == plan.cache_bytes
    assert model.flash.mode == "experts"


def test_a_calibrated_pack_is_planned_by_its_routing(tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    shutil.copytree(tiny_pack("olmoe").pack, pack)
    assert read_shape(pack).hits == UNIFORM
    manifest = read_manifest(pack)
    shares = PolicyShares(cache_share=0.5, lru=0.8, lfu=0.7, pinned=0.75, best="lru")
    layers = tuple(LayerRouting(counts=(1,) * entry.num_experts) for entry in manifest.experts)
    routing = Routing(
        fingerprint=fingerprint(manifest),
        text="a text",
        num_tokens=100,
        num_replayed_tokens=50,
        layers=layers,
        replays=(shares,),
    )
    write_routing(pack, routing)
    hits = read_shape(pack).hits
    assert hits.hit_share(0.5) == pytest.approx(0.8)
    assert hits.hit_share(0.75) == pytest.approx(0.9)
    assert hits.origin == "calibrated on a text, 50 tokens"
    write_routing(pack, routing.model_copy(update={"fingerprint": "of other weights"}))
    assert read_shape(pack).hits == UNIFORM


@pytest.mark.parametrize("mode", ["hybrid", "sparse", "naive"])
def test_modes_that_are_not_the_models_are_refused(olmoe: ModelShape, mode: str) -> None:
    with pytest.raises(ConfigError, match="mixture of experts"):
        make_plan(olmoe, RATES, 4 * GIB, mode=mode)


def test_experts_of_a_model_without_are_refused(tiny_pack: Callable[..., TinyPack]) -> None:
    with pytest.raises(ConfigError, match="no experts"):
        make_plan(read_shape(tiny_pack("opt").pack), RATES, 4 * GIB, mode="experts")


def test_twice_as_much_of_what_helps_helps(olmoe: ModelShape) -> None:
    assert make_plan(olmoe, RATES, 8 * GIB, context=64).would_help.startswith("dram")
    assert make_plan(olmoe, RATES, 32 * GIB, context=64).would_help.startswith("memory speed")


def test_overheads_are_times() -> None:
    layer_s, group_s = expert_overheads_s()
    assert 1e-5 < layer_s < 0.1
    assert 0 <= group_s < 0.1


def test_costs_add_up(olmoe: ModelShape) -> None:
    placement = place(olmoe.units, model_needs(olmoe, 64), 6 * GIB)
    cost = exact_token(olmoe, placement, RATES, dense_use(olmoe), reads_ahead=True)
    assert cost.io_s >= 0
    assert cost.total_s >= cost.roofline_s
