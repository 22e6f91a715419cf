"""Packs of tiny random models, made once per session and family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from flashlm.pack.convert import convert
from tests.models import save_checkpoint

NUM_POSITIONS = 160
OVERRIDES = {"stablelm": {"hidden_size": 64}}  # its rotary share must come out even
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
            convert(folder / "source", folder / "pack", dtype=dtype, block_rows=BLOCK_ROWS)
            made[family, dtype] = TinyPack(folder / "source", folder / "pack")
        return made[family, dtype]

    return make
