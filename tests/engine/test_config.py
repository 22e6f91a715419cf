"""`FlashConfig`: one settings object, made once, on its way through transformers; and what a run reads of a pack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

import flashlm
from flashlm.planner.settings import make_settings
from tests.engine.conftest import save_tokenizer

COUNT = """
import collections, sys
counts, pack = collections.Counter(), sys.argv[1]
def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(pack):
        counts[str(arguments[0])[len(pack) + 1 :]] += 1
sys.addaudithook(watch)
import flashlm.sizes
parse = flashlm.sizes.parse_budget_bytes
def counted(*arguments):
    counts["budgets parsed"] += 1
    return parse(*arguments)
flashlm.sizes.parse_budget_bytes = counted
"""
GENERATE = """
from pathlib import Path
from flashlm.engine.decoding import Sampling
from flashlm.engine.generate import generate
generate(Path(pack), "w3 w4", dram="2GiB", sampling=Sampling(max_new_tokens=2))
"""
STOCK = """
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(pack)
"""


def test_flash_config_is_taken_without_a_warning(tiny_pack):
    code = f"""if True:
        import flashlm
        from transformers import AutoModelForCausalLM
        asked = flashlm.FlashConfig(dram="4GiB", context=32)
        model = AutoModelForCausalLM.from_pretrained({str(tiny_pack("llama").pack)!r}, quantization_config=asked)
        print(model.flash.placement.dram_bytes, model.flash.context)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == [str(4 << 30), "32"]
    assert "quantization_config" not in done.stderr


def test_flash_config_holds_settings_and_a_config_of_a_file_takes_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("FLASHLM_CONTEXT", "77")
    assert flashlm.FlashConfig(dram="3GiB").settings == make_settings(dram="3GiB")
    of_file = flashlm.FlashConfig.from_dict({"quant_method": "flashlm", "format_version": 2})
    monkeypatch.setenv("FLASHLM_CONTEXT", "78")
    assert of_file.settings.context == 78  # made when it is first needed
    assert of_file.settings is of_file.settings
    assert of_file.to_dict() == {"quant_method": "flashlm", "format_version": 2}


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        # config.json: once by us, whose checksum is looked at, and once by transformers, which takes a path and no text.
        (GENERATE, {"flash/manifest.json": 1, "config.json": 2, "budgets parsed": 1}),
        # transformers' own read comes first, before it knows that this is a pack.
        (STOCK, {"flash/manifest.json": 1, "config.json": 2, "budgets parsed": 1}),
    ],
)
def test_a_run_reads_the_manifest_once_and_parses_its_settings_once(tiny_pack, tmp_path, program, expected):
    pack = tmp_path / "pack"
    shutil.copytree(tiny_pack("llama").pack, pack)
    save_tokenizer(pack)
    code = COUNT + program + f"import json; print(json.dumps({{name: counts[name] for name in {list(expected)!r}}}))"
    environment = {"FLASHLM_DRAM": "2GiB", "FLASHLM_CONTEXT": "64"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(pack)],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
