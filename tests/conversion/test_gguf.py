"""Models from GGUF files give what transformers' own reading of the same file gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import flashlm
from flashlm.conversion.convert import convert
from flashlm.pack.manifest import read_manifest
from tests.gguf_files import ARCHITECTURES, q4_0, save_gguf

# transformers 5.23 makes neither config nor experts of files of gpt-oss.
_NOT_OF_TRANSFORMERS = ("gpt-oss",)
TOKENS = torch.tensor([[3, 17, 42, 5, 90, 8, 23, 11]])


def check_same(wanted: PreTrainedModel, found: PreTrainedModel) -> None:
    with torch.no_grad():
        logits, mine = wanted(TOKENS).logits, found(TOKENS).logits
    torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(found.generate(TOKENS, **asked), wanted.generate(TOKENS, **asked))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gives_the_models_logits(architecture: str, tmp_path: Path) -> None:
    model = save_gguf(tmp_path / "tiny.gguf", architecture, q4_0)
    convert(tmp_path / "tiny.gguf", tmp_path / "pack", min_linear_bytes=0)
    assert read_manifest(tmp_path / "pack").quantised == ("q4_0",)
    check_same(model, flashlm.load(tmp_path / "pack"))
    if architecture not in _NOT_OF_TRANSFORMERS:
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="tiny.gguf", config=model.config, dtype=torch.float32
        )
        check_same(theirs.eval(), flashlm.load(tmp_path / "pack"))
