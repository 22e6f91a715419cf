"""A mixture of experts on the command line, from conversion to statistics."""

from __future__ import annotations

import json

import pytest

from flashlm.planner.profile import save_profile
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
