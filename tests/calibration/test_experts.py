"""A text through a pack of experts: what is recorded is what ran, loading goes by what is stored, and no bit changes."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch

import flashlm
from flashlm.calibration.dense import calibrate
from flashlm.calibration.experts import RoutingRecorder, calibrate_experts, may_have_zeros
from flashlm.calibration.routing_report import judge_row_reads
from flashlm.engine.experts import observed
from flashlm.errors import BudgetError, ConfigError, PackError
from flashlm.memory.expert_budget import NUM_SPARE_SLOTS
from flashlm.memory.expert_cache import replay
from flashlm.memory.expert_policy import POLICIES
from flashlm.pack.manifest import read_manifest
from flashlm.probe.device_profile import RowReadPoint, profile_path
from flashlm.sparsity.routing import read_routing, routing_path, write_routing
from tests.engine.conftest import save_tokenizer
from tests.engine.test_experts import experts_of, prompt
from tests.planner.profiles import make_profile


@pytest.fixture(scope="module")
def calibrated(tiny_pack, text, tmp_path_factory):
    """Packs with a tokenizer and a routing calibration, and the report, by family."""
    made = {}

    def make(family):
        if family not in made:
            pack = shutil.copytree(tiny_pack(family).pack, tmp_path_factory.mktemp("calibrated") / family)
            save_tokenizer(pack)
            made[family] = pack, calibrate_experts(pack, text)
        return made[family]

    return make


def count(seen, module, args):
    seen += torch.bincount(args[1].flatten(), minlength=len(seen))


@pytest.mark.parametrize("family", ["olmoe", "nemotron_h"])
def test_uses_are_those_of_a_model_that_transformers_runs(family, calibrated, tiny_pack, text):
    pack, report = calibrated(family)
    routing = read_routing(pack, read_manifest(pack))
    assert routing == report.routing
    reference = tiny_pack(family).reference("float32")
    counts = [torch.zeros(8, dtype=torch.int64) for _ in routing.layers]
    hooks = [
        module.register_forward_pre_hook(partial(count, seen))
        for module, seen in zip(experts_of(reference), counts, strict=True)
    ]
    words = [int(word[1:]) for word in text.read_text().split()]
    with torch.no_grad():
        for window in torch.tensor(words[: routing.num_tokens]).view(-1, report.window_tokens):
            reference(input_ids=window[None])
    for hook in hooks:
        hook.remove()
    assert len(words) - report.window_tokens < routing.num_tokens <= len(words)
    for layer, seen in zip(routing.layers, counts, strict=True):
        assert sum(layer.counts) == 3 * routing.num_tokens
        # fp32 sums in another order may send a token elsewhere where two experts are level.
        assert sum(abs(mine - theirs) for mine, theirs in zip(layer.counts, seen.tolist(), strict=True)) <= 4


def test_zeros_inside_experts_are_counted_where_they_are_exact(calibrated, tiny_pack):
    _, gated = calibrated("olmoe")
    assert [layer.zero_share for layer in gated.routing.layers] == [None, None]
    assert gated.row_reads is None
    _, squared = calibrated("nemotron_h")
    shares = [layer.zero_share for layer in squared.routing.layers]
    assert all(0.3 < share < 0.7 for share in shares)  # random weights: about half
    assert "zeros inside experts" in dict(squared.rows())
    assert "reading rows apart" in dict(squared.rows())
    assert may_have_zeros("relu2")
    assert may_have_zeros("custom")
    assert not may_have_zeros("silu")


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_counted_zeros_are_those_of_the_formula(num_tokens, tiny_pack):
    """Both ways through an expert: row kernels, and matrix products."""
    pack = tiny_pack("nemotron_h").pack
    reference = tiny_pack("nemotron_h").reference("float32")
    model = flashlm.load(pack)
    entry = model.flash.manifest.experts[1]
    tokens = torch.randn(num_tokens, 48, generator=torch.Generator().manual_seed(3))
    index, weights = torch.full((num_tokens, 1), 5), torch.ones(num_tokens, 1)
    recorder = RoutingRecorder(2, counts_zeros=True)
    with observed(model, recorder):
        model.get_submodule(entry.module)(tokens, index, weights)
    with torch.no_grad():
        inner = tokens @ reference.get_submodule(entry.module).up_proj[5].T
    assert recorder.zero_share(1) == pytest.approx((inner <= 0).double().mean().item(), abs=1e-3)
    assert recorder.zero_share(0) is None
    assert model.get_submodule(entry.module).flash_experts.observer is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_hits_and_misses_as_the_engine_does(policy, calibrated):
    pack, _ = calibrated("olmoe")
    manifest = read_manifest(pack)
    model = flashlm.load(pack, pin=manifest.streamed_bytes // 2, expert_policy=policy)
    store = model.flash.experts
    recorder = RoutingRecorder(len(manifest.experts), counts_zeros=False)
    with torch.no_grad(), observed(model, recorder):
        cache = None
        for token in prompt(1, 60)["input_ids"][0]:
            cache = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
    trace = recorder.trace(manifest).steps()
    expected = [[0, 0] for _ in manifest.experts]
    steps = replay(
        trace,
        model.flash.placement.experts,
        store.policy.eviction,
        store.policy.pinned,
        warm=store.policy.warm,
        num_spare=NUM_SPARE_SLOTS,
    )
    for (layer, _), (hits, misses) in zip(trace, steps, strict=True):
        expected[layer][0] += hits
        expected[layer][1] += misses
    assert [[each.num_hits, each.num_misses] for each in store.traffic] == expected
    assert sum(each.num_misses for each in store.traffic) > 0


@pytest.mark.parametrize("family", ["olmoe", "nemotron_h"])
def test_the_policy_changes_no_bit(family, calibrated, tiny_pack):
    pack, _ = calibrated(family)
    bound = read_manifest(pack).streamed_bytes // 2
    outputs = []
    for source, policy in ((tiny_pack(family).pack, None), *((pack, policy) for policy in ("auto", *POLICIES))):
        model = flashlm.load(source, pin=bound, expert_policy=policy)
        logits = []
        for shape in ((1, 1), (3, 40), (1, 40)):
            out = model.generate(
                **prompt(*shape), max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            logits.append(torch.stack(out.logits))
        outputs.append(logits)
    for logits in outputs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(logits, outputs[0], strict=True))


def test_loading_takes_the_best_policy_and_holds_the_most_used(calibrated, tmp_path):
    source, report = calibrated("olmoe")
    pack = shutil.copytree(source, tmp_path / "pack")
    for policy in POLICIES:
        replays = [
            each.model_copy(update={"lru": 0.1, "lfu": 0.1, "pinned": 0.1, policy: 0.5, "best": policy})
            for each in report.routing.replays
        ]
        write_routing(pack, report.routing.model_copy(update={"replays": tuple(replays)}))
        model = flashlm.load(pack, pin=read_manifest(pack).streamed_bytes * 3 // 4)
        store = model.flash.experts
        assert store.describe()["policy"] == policy
        assert f", {policy}" in model.flash.describe()
        for layer, (found, capacity) in enumerate(
            zip(report.routing.layers, model.flash.placement.experts, strict=True)
        ):
            ranked = sorted(range(8), key=lambda expert, counts=found.counts: (-counts[expert], expert))
            assert set(store.cache.held(layer)) == set(ranked[:capacity])
            assert store.policy.pinned[layer] == (tuple(sorted(ranked[: capacity // 2])) if policy == "pinned" else ())
    assert flashlm.load(pack, expert_policy="lru").flash.experts.describe()["policy"] == "lru"


def test_a_damaged_calibration_is_announced_and_left_out_unless_pinned_needs_it(calibrated, tmp_path, caplog):
    pack = shutil.copytree(calibrated("olmoe")[0], tmp_path / "pack")
    routing_path(pack).write_text("{")
    for policy in (None, "lfu"):
        caplog.clear()
        model = flashlm.load(pack, expert_policy=policy)
        assert model.flash.experts.describe()["policy"] == (policy or "lru")
        assert "does without this pack's routing calibration" in caplog.text
    with pytest.raises(PackError, match="is not JSON"):
        flashlm.load(pack, expert_policy="pinned")
    routing_path(pack).unlink()
    with pytest.raises(ConfigError, match="no routing calibration, which expert policy pinned needs"):
        flashlm.load(pack, expert_policy="pinned")


def test_policies_that_do_not_go_are_refused(tiny_pack):
    with pytest.raises(ConfigError, match="choose one of auto, lru, lfu, pinned"):
        flashlm.FlashConfig(expert_policy="fifo")
    with pytest.raises(ConfigError, match="expert_policy='lfu': this pack has no experts"):
        flashlm.load(tiny_pack("llama").pack, expert_policy="lfu")


def test_packs_that_do_not_go_and_bad_settings_are_refused(calibrated, tiny_pack, text, tmp_path):
    pack, _ = calibrated("olmoe")
    with pytest.raises(ConfigError, match="has no experts"):
        calibrate_experts(tiny_pack("llama").pack, text)
    with pytest.raises(ConfigError, match="`calibrate_experts` is for such packs"):
        calibrate(pack, text)
    with pytest.raises(ConfigError, match="max_tokens=0"):
        calibrate_experts(pack, text, max_tokens=0)
    with pytest.raises(BudgetError, match="calibrating keeps"):
        calibrate_experts(pack, text, dram="8MiB")


def test_figures_are_drawn(calibrated, text, tmp_path):
    pytest.importorskip("matplotlib")
    pack = shutil.copytree(calibrated("olmoe")[0], tmp_path / "pack")
    calibrate_experts(pack, text, max_tokens=256, plots=tmp_path / "plots")
    for name in ("expert-use.png", "expert-policies.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("random_gb_per_s", "verdict"), [(0.01, "can't win: takes"), (1000.0, "at most")])
def test_reading_rows_apart_is_judged_by_the_devices_profile(
    random_gb_per_s, verdict, calibrated, tmp_path, monkeypatch
):
    pack, report = calibrated("nemotron_h")
    monkeypatch.setenv("FLASHLM_CACHE", str(tmp_path))
    unknown = judge_row_reads(pack, read_manifest(pack), report.routing)
    assert "this device has no profile" in unknown.verdict()
    batches = tuple(
        RowReadPoint(row_bytes=size, num_rows=count, seconds=count * size / random_gb_per_s / 1e9)
        for size in (4096, 16384)
        for count in (100, 600)
    )
    profile = make_profile().model_copy(update={"row_reads": batches})
    path = profile_path(pack)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.model_dump_json())
    judged = judge_row_reads(pack, read_manifest(pack), report.routing)
    assert judged.verdict().startswith(verdict)
    assert judged.bound.can_win == (verdict == "at most")


def test_another_profile_is_announced_and_left_out(calibrated, tmp_path, monkeypatch, caplog):
    pack, report = calibrated("nemotron_h")
    monkeypatch.setenv("FLASHLM_CACHE", str(tmp_path))
    path = profile_path(pack)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")
    assert judge_row_reads(pack, read_manifest(pack), report.routing).bound is None
    assert "is not judged" in caplog.text
