"""A mixture of experts on the command line, from conversion to statistics."""

from __future__ import annotations

import json
import shutil

import pytest

from flashlm.pack.manifest import manifest_path, read_manifest, unit_path
from flashlm.probe.device_profile import save_profile
from tests.cli.test_cli import flashlm
from tests.engine.conftest import save_tokenizer
from tests.models import save_checkpoint
from tests.planner.profiles import make_profile, profile_of


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "source"
    save_checkpoint(folder, "olmoe", max_position_embeddings=128)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def pack(source):
    folder = source.parent / "pack"
    done = flashlm("convert", source, folder, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    assert "16 of 48 x 40 in 2 layers" in done.stdout
    assert "6 experts" in done.stdout
    return folder


def test_info_says_what_a_token_uses_and_the_floor(pack):
    done = flashlm("info", pack, "--json")
    content = json.loads(done.stdout)
    assert (content["num_experts"], content["num_active_experts"], content["expert_bytes"]) == (16, 6, 40960)
    assert content["smallest_dram_bytes"] > 6 * 40960
    assert "smallest --dram" in flashlm("info", pack).stdout


def test_verify_checks_experts(pack):
    done = flashlm("verify", pack)
    assert done.returncode == 0
    assert "all checksums match" in done.stdout


def test_generate_reports_hits_and_misses_of_each_layer(pack, tmp_path):
    floor = json.loads(flashlm("info", pack, "--json").stdout)["smallest_dram_bytes"] + (64 << 20)
    arguments = ("generate", pack, "--prompt", "w5 w6 w7 w8", "--max-new-tokens", 8, "--dram", floor)
    table = flashlm(*arguments, "--stats")
    assert table.returncode == 0, table.stderr
    assert "experts, layer 1" in table.stdout
    assert "lru: 16 of 16 fit" in table.stdout
    assert "mode experts (exact)" in table.stderr
    stats = json.loads(flashlm(*arguments, "--json").stdout)["stats"]
    assert stats["mode"] == "experts"
    prompt, decode = stats["prefill"], stats["decode"]
    counted = sum(stats["experts"]["hits"]) + sum(stats["experts"]["misses"])
    assert counted == sum(phase[f"{what}_experts"] for phase in (prompt, decode) for what in ("hit", "miss"))
    assert decode["expert_hit_share"] == 1.0  # 64 MiB hold them all


def test_eval_takes_the_packs_mode(pack, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + index % 40}" for index in range(200)))
    done = flashlm("eval", pack, "--text", text, "--json")
    assert done.returncode == 0, done.stderr
    assert [each["mode"] for each in json.loads(done.stdout)["modes"]] == ["experts"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("generate", "{pack}", "--prompt", "w5", "--mode", "sparse"), 2, "this pack streams experts"),
        (("generate", "{pack}", "--prompt", "w5", "--dram", "64MiB"), 3, "one token's experts"),
        (("plan", "{pack}", "--mode", "hybrid"), 2, "mixture of experts"),
        (("plan", "{pack}", "--dram", "64MiB"), 3, "one token's experts"),
        (("calibrate", "{pack}", "--rank", "8", "--seed", "1"), 2, "--rank, --seed: this pack streams experts"),
        (("generate", "{pack}", "--prompt", "w5", "--plot-experts", "traffic.jpg"), 2, "figures are PNG"),
        (("generate", "{pack}", "--prompt", "w5", "--expert-policy", "pinned"), 2, "no routing calibration"),
    ],
)
def test_what_does_not_go_is_said_in_one_line(arguments, code, message, pack, source):
    done = flashlm(*(each.format(pack=pack, source=source) for each in arguments))
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_plan_foretells_packs_and_configs(pack, source, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHLM_CACHE", str(tmp_path))
    save_profile(make_profile(), profile_of(pack))
    for what in (pack, source):
        done = flashlm("plan", what, "--dtype", "fp32", "--dram", "64MiB,2GiB", "--plot", tmp_path / "plan.png")
        assert done.returncode == 0, done.stderr
        assert "does not fit" in done.stdout
        assert "ASSUMED uniform" in done.stdout
        assert (tmp_path / "plan.png").stat().st_size > 0
    content = json.loads(flashlm("plan", pack, "--dram", "2GiB", "--json").stdout)
    assert content["routing"].startswith("ASSUMED")
    assert content["budgets"][0]["mode"] == "experts"


def test_calibrate_reports_routing_and_info_keeps_it(pack, tmp_path):
    calibrated = shutil.copytree(pack, tmp_path / "pack")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + index * index % 40}" for index in range(600)))
    done = flashlm("calibrate", calibrated, "--text", text, "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert [sum(layer["counts"]) for layer in content["layers"]] == [3 * content["num_tokens"]] * 2
    assert [each["cache_share"] for each in content["replays"]] == [0.375, 0.5, 0.75]
    table = flashlm("info", calibrated).stdout
    assert f"text.txt, {content['num_tokens']} tokens" in table
    assert "found where 75 % fit" in table
    assert flashlm("verify", calibrated).returncode == 0
    again = flashlm("calibrate", calibrated, "--text", text).stdout
    assert "top 1/4" in again
    assert "most used quarter" in again


def test_generate_draws_its_traffic(pack, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "traffic.png"
    done = flashlm("generate", pack, "--prompt", "w5 w6", "--max-new-tokens", 2, "--plot-experts", path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["generate", "info", "verify", "calibrate"])
def test_a_newer_pack_is_refused_in_one_line(command, pack, tmp_path):
    newer = tmp_path / "pack"
    manifest_path(newer).parent.mkdir(parents=True)
    shutil.copy(pack / "config.json", newer)
    content = manifest_path(pack).read_text().replace('"format_version": 5', '"format_version": 6')
    manifest_path(newer).write_text(content)
    done = flashlm(command, newer, *(("--prompt", "w5") if command == "generate" else ()))
    assert done.returncode == 4
    assert "has format version 6, this flashlm reads versions 4 and 5: update flashlm" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_verify_finds_a_flipped_bit_and_generate_where_it_reads_it(pack, tmp_path):
    damaged = shutil.copytree(pack, tmp_path / "pack")
    manifest = read_manifest(damaged)
    path = unit_path(damaged, manifest.experts[0])
    raw = bytearray(path.read_bytes())
    raw[manifest.experts[0].layout.offset_of(6) + 2] ^= 1
    path.write_bytes(raw)
    done = flashlm("verify", damaged)
    assert done.returncode == 4
    assert "experts-00000.rows: expert 6" in done.stderr
    refused = flashlm("generate", damaged, "--prompt", "w5", "--max-new-tokens", 2)
    assert refused.returncode == 4
    assert "experts-00000.rows: expert 6 is damaged" in refused.stderr
    unchecked = flashlm("generate", damaged, "--prompt", "w5", "--max-new-tokens", 2, "--check", "none")
    assert unchecked.returncode == 0, unchecked.stderr
