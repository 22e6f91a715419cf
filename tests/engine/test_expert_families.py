"""Every family of the installed transformers that uses the experts interface: which convert, and whether they match.

`docs/models.md` has the table. A family that begins or ceases to work, and a new one, fails here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import flashlm
from flashlm.conversion.convert import convert
from flashlm.errors import FlashError
from tests import tiny_models

# Families that are refused, and why.
REFUSED: dict[str, str] = {}
MAX_ERROR = 5e-5  # of the largest logit: fp32 sums in another order, and by another library, through four layers


def families() -> list[str]:
    """Model types with a causal language model whose code uses the experts interface."""
    root = Path(transformers.__file__).parent / "models"
    using = {
        path.parent.name
        for path in root.glob("*/modeling_*.py")
        if re.search(r"^@use_experts_implementation", path.read_text(), re.MULTILINE)
    }
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if model_type_to_module_name(name) in using)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
@pytest.mark.filterwarnings("ignore")
def test_families_of_the_interface_convert_and_match(family, tmp_path):
    tiny_models.save_tiny(family, tmp_path / "source")
    if family in REFUSED:
        with pytest.raises(FlashError, match=REFUSED[family]):
            convert(tmp_path / "source", tmp_path / "pack", dtype="float32")
        return
    manifest = convert(tmp_path / "source", tmp_path / "pack", dtype="float32")
    assert manifest.experts
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="float32").eval()
    streamed = flashlm.load(tmp_path / "pack", pin=0)
    for num_tokens in (1, 40):
        ids = torch.randint(3, 96, (2, num_tokens), generator=torch.Generator().manual_seed(num_tokens))
        with torch.no_grad():
            wanted, found = reference(ids).logits, streamed(ids).logits
        assert (wanted - found).abs().max() <= MAX_ERROR * wanted.abs().max(), num_tokens
    assert streamed.flash.telemetry.records[-1].miss_experts
