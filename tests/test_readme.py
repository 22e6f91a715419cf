"""What the README shows works, and the package exports what it says."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import flashlm
from flashlm.cli.app import main
from flashlm.probe.device_profile import profile_path, save_profile
from tests.models import save_checkpoint
from tests.planner.profiles import make_profile

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def folder_with_model(tmp_path, monkeypatch):
    """A folder in which the README's `path/to/llama` and `my-text.txt` exist."""
    source = tmp_path / "path/to/llama"
    save_checkpoint(source, "llama", max_position_embeddings=512)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 96)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(source)
    words = random.Random(0).choices([f"w{index}" for index in range(3, 96)], k=1500)
    (tmp_path / "my-text.txt").write_text(" ".join(words))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHLM_CACHE", str(tmp_path / "cache"))
    save_profile(make_profile(), profile_path(tmp_path))  # so that `plan` need not probe
    return tmp_path


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_readme_commands_and_code_run(folder_with_model, capsys):
    (commands,) = blocks("sh")
    for line in commands.splitlines():
        words = re.findall(r'"[^"]*"|\S+', line.split(" #")[0])
        assert words[0] == "flashlm"
        with pytest.raises(SystemExit) as done:
            main([word.strip('"') for word in words[1:]])
        assert not done.value.code, line
    exec(compile("\n".join(blocks("python")), "README.md", "exec"), {})
    assert "mode hybrid (exact)" in capsys.readouterr().out


def test_everything_in_all_is_there():
    for name in flashlm.__all__:
        assert getattr(flashlm, name) is not None
    assert sorted(flashlm.__all__) == flashlm.__all__


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = flashlm.nonsense
