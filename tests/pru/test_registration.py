"""`import flashlm` alone, before or after transformers, is enough for transformers to know `pru` models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flashlm.pru import PRUConfig, PRUForCausalLM

LOAD = """
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(config).__module__, type(model).__name__)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pru")
    config = PRUConfig(vocab_size=20, embedding_size=8, hidden_size=8, num_layers=2, groups=2)
    PRUForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import flashlm, transformers",
        "import transformers; transformers.AutoModelForCausalLM; import flashlm",
        "import flashlm.pru; flashlm.pru.PRUForCausalLM; import transformers",
    ],
)
def test_auto_classes_know_pru_models(imports: str, saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}{LOAD}", str(saved)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["flashlm.pru.config", "PRUForCausalLM"]


def test_importing_flashlm_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, flashlm; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_saved_folder_has_the_layout_of_the_hub(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
