"""Settings as users write them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flashlm.errors import ConfigError
from flashlm.planner.settings import make_settings


@pytest.mark.parametrize("pin", ["0", 0, "0 GiB"])
def test_a_pin_of_zero_pins_nothing(pin):
    assert make_settings(pin=pin).pin_bytes == 0


@pytest.mark.parametrize("pin", [-1, "-1", "much"])
def test_a_pin_that_is_no_size_is_refused(pin):
    with pytest.raises(ConfigError, match=r"not a size|not be below zero"):
        make_settings(pin=pin)


@pytest.mark.parametrize(("dram", "meant"), [("7", "7GiB"), (16, "16GiB"), ("8 B", None)])
def test_a_budget_without_its_unit_is_asked_about(dram, meant):
    with pytest.raises(ConfigError, match=f"did you mean {meant}" if meant else "give more"):
        make_settings(dram=dram)


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
