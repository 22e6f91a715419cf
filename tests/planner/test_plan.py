"""Shapes from configs and packs, plans under budgets, and plans given back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashlm
from flashlm.cli.app import main
from flashlm.errors import BudgetError, ConfigError, PackError, UnsupportedModelError
from flashlm.memory.budget import Placement, RowCache
from flashlm.memory.cache_plan import LayerUse
from flashlm.memory.neuron_cache import LayerCapacity
from flashlm.planner.cost import Overlap
from flashlm.planner.estimate import sparse_token
from flashlm.planner.machine import rates_of
from flashlm.planner.plan import make_plan, model_needs, row_reads
from flashlm.planner.plan_document import load_plan, save_plan
from flashlm.planner.published import assume_sparsity
from flashlm.planner.rates import Rates, ReadSetting
from flashlm.planner.settings import make_settings
from flashlm.planner.shape import ModelShape, SparseShape, read_shape
from flashlm.probe.device_profile import save_profile
from tests.engine.conftest import TinyPack
from tests.models import save_checkpoint, tiny_model
from tests.planner.profiles import make_profile, profile_of

RATES = Rates(
    stream_gb_per_s={1 << 16: 0.5, 1 << 20: 2.0},
    random_gb_per_s={4096: 0.1, 16384: 0.5, 65536: 1.2},
    batch_latency_s=1e-4,
    memory_gb_per_s=25.0,
    matrix_gb_per_s=20.0,
    block_up_gb_per_s=18.0,
    block_down_gb_per_s=11.0,
    row_up_gb_per_s=17.0,
    row_down_gb_per_s=10.0,
    predictor_gb_per_s=10.0,
    gemm_gflop_per_s=70.0,
    layer_overhead_s=3e-4,
    manage_row_s=2e-8,
    overlap=Overlap(read_share=0.9, compute_share=0.9),
)
GIB = 1 << 30


@pytest.fixture(scope="module")
def opt_6_7b(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """The real shape, from a config alone."""
    folder = tmp_path_factory.mktemp("opt-6.7b")
    config = {
        "model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 4096, "activation_function": "relu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return read_shape(folder / "config.json")


def sparse_of(shape: ModelShape, *, has_passed: bool) -> ModelShape:
    uses = tuple(LayerUse(num_rows=each.num_rows, use_curve=(0.1, 0.14, 0.17, 0.19, 0.2)) for each in shape.layouts)
    sparse = SparseShape(
        uses=uses,
        active_shares=(0.04,) * len(uses),
        predictor_bytes=100 << 20,
        increase=0.005,
        has_passed=has_passed,
        origin="made up",
    )
    return replace(shape, sparse=sparse)


def test_a_config_alone_gives_the_published_sizes(opt_6_7b: ModelShape) -> None:
    layers_bytes = 32 * (16384 * 2 + 4 * 4096) * 4096 * 2  # attention too
    assert opt_6_7b.streamed_bytes == layers_bytes + 50272 * 4096 * 2  # and the output layer, which has the embeddings
    assert opt_6_7b.total_bytes / 1e9 == pytest.approx(13.3, rel=0.01)
    attention_and_output = 32 * 4 * 4096**2 + 50272 * 4096
    assert opt_6_7b.matrix_bytes == 2 * attention_and_output


@pytest.mark.parametrize("family", ["opt", "llama", "phi3", "gpt2", "gemma2", "falcon"])
def test_a_config_plans_what_its_pack_will_be(family: str, tiny_pack: Callable[..., TinyPack]) -> None:
    made = tiny_pack(family, "float32")
    planned, pack = read_shape(made.source, dtype="fp32"), read_shape(made.pack)
    assert (planned.is_pack, pack.is_pack) == (False, True)
    assert planned.activation == pack.activation
    assert planned.matrix_bytes == pack.matrix_bytes
    assert [each.num_rows for each in planned.layouts] == [each.num_rows for each in pack.layouts]
    assert planned.resident_bytes == pytest.approx(pack.resident_bytes, rel=0.1)  # the file has a header


def test_matrices_are_what_a_token_multiplies_with(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    save_checkpoint(tmp_path, "llama", tie_word_embeddings=False)
    expected = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".mlp." not in name
    )
    assert read_shape(tmp_path, dtype="fp32").matrix_bytes == 4 * expected


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(5 * GIB, 15 * GIB), st.integers(0, 4 * GIB), st.sampled_from(["hybrid", "sparse"]))
def test_more_dram_is_never_slower(opt_6_7b: ModelShape, dram_bytes: int, more_bytes: int, mode: str) -> None:
    shape = sparse_of(opt_6_7b, has_passed=True)
    try:
        plan = make_plan(shape, RATES, dram_bytes, context=256, mode=mode)
    except BudgetError:
        return
    richer = make_plan(shape, RATES, dram_bytes + more_bytes, context=256, mode=mode)
    assert richer.token_s <= plan.token_s * 1.001
    assert plan.roofline_s <= plan.token_s * 1.001
    assert plan.token_s == pytest.approx(plan.io_s + plan.manage_s + plan.compute_s)


def test_a_layer_without_room_for_its_rows_is_gone_through_in_passes(opt_6_7b: ModelShape) -> None:
    shape = sparse_of(opt_6_7b, has_passed=True)  # 1638 rows of a layer used
    assert shape.sparse is not None
    plain, dear = RATES, replace(RATES, sparse_layer_overhead_s=1e-3)
    for num_slots, passes in ((4000, 1), (1000, 2), (400, 5)):
        capacity = LayerCapacity(num_rows=16384, num_slots=num_slots)
        rows = (RowCache(capacity=capacity, num_streamed=0, cache_bytes=0, streamed_bytes=0),) * 32
        placement = Placement(dram_bytes=0, needs=model_needs(shape, 256), units=rows)
        cost, more = (sparse_token(shape, shape.sparse, placement, rates) for rates in (plain, dear))
        assert more.compute_s - cost.compute_s == pytest.approx(32 * passes * 1e-3)


def test_auto_is_sparse_only_after_a_passed_calibration(opt_6_7b: ModelShape) -> None:
    assert make_plan(opt_6_7b, RATES, 7 * GIB, context=256).mode == "hybrid"
    failed = make_plan(sparse_of(opt_6_7b, has_passed=False), RATES, 7 * GIB, context=256)
    assert (failed.mode, failed.is_exact) == ("hybrid", True)
    passed = make_plan(sparse_of(opt_6_7b, has_passed=True), RATES, 7 * GIB, context=256)
    assert (passed.mode, passed.is_exact) == ("sparse", False)
    whole = make_plan(sparse_of(opt_6_7b, has_passed=True), RATES, 20 * GIB, context=256)
    assert (whole.mode, whole.read_bytes) == ("hybrid", 0)


def test_below_the_floor_is_refused_with_what_is_needed(opt_6_7b: ModelShape) -> None:
    with pytest.raises(BudgetError, match=r"dram=512.0 MiB is below the \d") as refused:
        make_plan(opt_6_7b, RATES, GIB // 2, context=256)
    assert make_plan(opt_6_7b, RATES, refused.value.needed_bytes + (16 << 20), context=256).token_s > 0


def test_sparse_of_an_unknown_model_is_refused(opt_6_7b: ModelShape) -> None:
    with pytest.raises(ConfigError, match="flashlm calibrate"):
        make_plan(opt_6_7b, RATES, 7 * GIB, mode="sparse")


def test_assumed_sparsity_says_so(opt_6_7b: ModelShape, tmp_path: Path) -> None:
    assumed = assume_sparsity(opt_6_7b)
    assert assumed.sparse is not None
    assert "ASSUMED" in assumed.sparse.origin
    assert make_plan(assumed, RATES, 7 * GIB, context=256).mode == "hybrid"  # nothing was measured
    assert make_plan(assumed, RATES, 7 * GIB, context=256, mode="sparse").token_s > 0
    save_checkpoint(tmp_path, "llama")
    silu = read_shape(tmp_path)
    assert assume_sparsity(silu) is silu


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, PackError, r"config.json is missing"),
        ("{", PackError, "not JSON"),
        ('{"model_type": "never-heard-of"}', UnsupportedModelError, "can't be used"),
    ],
)
def test_configs_that_cant_be_planned(
    content: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        read_shape(tmp_path)


def test_a_source_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a pack"):
        read_shape("/nonexistent/model")


def test_a_plan_is_saved_and_given_back(tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> None:
    pack = tiny_pack("opt", "float32").pack
    plan = make_plan(read_shape(pack), RATES, 3 * GIB, context=77)
    path = tmp_path / "plan.json"
    save_plan(plan, path)
    assert load_plan(path) == plan
    model = flashlm.load(pack, plan=path)
    assert (model.flash.mode, model.flash.context) == (plan.mode, 77)
    assert model.flash.placement.dram_bytes == 3 * GIB
    assert flashlm.load(pack, plan=path, context=99).flash.context == 99
    path.write_text(plan.model_copy(update={"queue_depth": 7}).model_dump_json())
    assert "queue depth 7" in flashlm.load(pack, plan=path).flash.describe()


def test_a_plan_says_nothing_of_another_budget_or_mode(opt_6_7b: ModelShape, tmp_path: Path) -> None:
    plan = make_plan(opt_6_7b, RATES, 7 * GIB, context=256)
    path = tmp_path / "plan.json"
    save_plan(plan, path)
    same = make_settings(plan=path)
    assert same.reads is not None
    assert (same.reads.staging_bytes, same.reads.queue_depth, same.reads.piece_bytes) == (
        plan.staging_bytes,
        plan.queue_depth,
        plan.piece_bytes,
    )
    for changed in (make_settings(plan=path, dram="8GiB"), make_settings(plan=path, mode="naive")):
        assert changed.reads is None


def test_staging_covers_the_pauses_and_no_more(opt_6_7b: ModelShape) -> None:
    short = make_plan(opt_6_7b, RATES, 7 * GIB, context=256)
    long = make_plan(opt_6_7b, replace(RATES, layer_overhead_s=40e-3), 7 * GIB, context=256)
    pause_s = 40e-3 + opt_6_7b.matrix_bytes / 20e9 / 32
    assert short.staging_bytes < long.staging_bytes
    assert long.staging_bytes >= pause_s * 2e9
    assert short.pinned_bytes > long.pinned_bytes
    ends = (make_plan(opt_6_7b, RATES, dram_bytes, context=256) for dram_bytes in (6 * GIB, 9 * GIB))
    assert all(plan.pinned_bytes + plan.staging_bytes < plan.dram_bytes for plan in ends)


def test_reads_differ_from_the_default_only_where_that_is_clearly_faster(opt_6_7b: ModelShape) -> None:
    def settings_with(gb_per_s: float) -> tuple[ReadSetting, ...]:
        return (
            ReadSetting(piece_bytes=1 << 20, queue_depth=32, gb_per_s=2.0),
            ReadSetting(piece_bytes=256 << 10, queue_depth=128, gb_per_s=gb_per_s),
        )

    for gb_per_s, expected in ((2.1, (1 << 20, 64)), (2.5, (256 << 10, 128))):
        plan = make_plan(opt_6_7b, replace(RATES, stream_settings=settings_with(gb_per_s)), 7 * GIB, context=256)
        assert (plan.piece_bytes, plan.queue_depth) == expected
    shallow = tuple(
        ReadSetting(piece_bytes=16384, queue_depth=depth, gb_per_s=rate) for depth, rate in ((8, 0.5), (128, 0.3))
    )
    assert row_reads(replace(RATES, random_settings=shallow), 16384).queue_depth == 8
    assert row_reads(RATES, 16384).queue_depth == 256


def test_a_sparse_plan_names_its_window(opt_6_7b: ModelShape) -> None:
    shape = sparse_of(opt_6_7b, has_passed=True)
    windows = [make_plan(shape, RATES, dram * GIB, context=256, mode="sparse").window for dram in (6, 7, 9, 14)]
    assert windows == sorted(windows)
    assert windows[0] < windows[-1] == 5  # as far as the curve goes
    assert make_plan(shape, RATES, 7 * GIB, context=256, mode="hybrid").window == 0


@pytest.mark.parametrize("content", ["", "[]", '{"plan_version": 1}', '{"plan_version": 2}', "{"])
def test_a_damaged_plan_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"plan\.json"):
        load_plan(path)
    with pytest.raises(ConfigError, match="is not there: make a plan with"):
        load_plan(tmp_path / "none.json")


def test_the_command_prints_budgets_that_fit_and_that_dont(
    opt_6_7b: ModelShape, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHLM_CACHE", str(tmp_path / "cache"))
    save_profile(make_profile(), profile_of(tmp_path))
    save_checkpoint(tmp_path / "model", "opt")
    source = str(tmp_path / "model")
    with pytest.raises(SystemExit) as done:
        main(["plan", source, "--dram", "100MiB,3GiB", "--probe-dir", str(tmp_path), "--dtype", "fp32"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "tokens/s" in shown
    with pytest.raises(SystemExit):
        main(
            [
                "plan",
                source,
                "--dram",
                "3GiB",
                "--probe-dir",
                str(tmp_path),
                "--json",
                "--save",
                str(tmp_path / "p.json"),
            ]
        )
    content = json.loads(capsys.readouterr().out)
    assert content["budgets"][0]["mode"] == "hybrid"
    assert load_plan(tmp_path / "p.json").dram_bytes == 3 * GIB
    with pytest.raises(SystemExit) as done:
        main(["plan", source, "--dram", "100MiB", "--probe-dir", str(tmp_path)])
    assert done.value.code == 3


def test_rates_of_a_profile_without_the_dtype_are_refused() -> None:
    assert rates_of(make_profile(), "bfloat16").matrix_gb_per_s > 0
    with pytest.raises(ConfigError, match=r"float8.*flashlm probe"):
        rates_of(make_profile(), "float8")
