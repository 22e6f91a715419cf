"""Packs of tiny random models, made once per session and family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flashlm.conversion.convert import convert
from tests.models import EXPERT_FAMILIES, save_checkpoint

NUM_POSITIONS = 160
OVERRIDES = {"stablelm": {"hidden_size": 64}}  # its rotary share must come out even
VOCAB = 96  # of tests.models
NUM_TEXT_TOKENS = 1024
BLOCK_ROWS = 16  # several blocks a layer, the last one ragged


@dataclass(frozen=True)
class TinyPack:
    """A pack and the checkpoint that it was made from."""

    source: Path
    pack: Path

    def reference(self, dtype: str) -> PreTrainedModel:
        """The same model as plain transformers loads it."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype).eval()


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], TinyPack]:
    made: dict[tuple[str, str], TinyPack] = {}

    def make(family: str, dtype: str = "float32") -> TinyPack:
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{dtype}")
            positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
            overrides = {positions: NUM_POSITIONS, **OVERRIDES.get(family, {})}
            save_checkpoint(folder / "source", family, **overrides)
            block_rows = None if family in EXPERT_FAMILIES else BLOCK_ROWS
            convert(folder / "source", folder / "pack", dtype=dtype, block_rows=block_rows)
            made[family, dtype] = TinyPack(folder / "source", folder / "pack")
        return made[family, dtype]

    return make


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the words w3, w4, ... beside a tiny model."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words with some order, so that a random model sees more than noise."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 7, (NUM_TEXT_TOKENS,), generator=generator).cumsum(0) % (VOCAB - 3) + 3
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{int(token)}" for token in steps))
    return path
