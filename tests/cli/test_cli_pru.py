"""`flashlm pru` from end to end on a small text."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flashlm.cli.app import main

SMALL = ["hidden_size=8", "embedding_size=8", "groups=2", "bptt=8", "batch_size=2"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("the cat sat on the <unk>\na dog sat\n\n" * 12)
    return tmp_path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def train(text: Path, *more: object) -> int:
    settings = [part for option in SMALL for part in ("--set", option)]
    return run("pru", "train", "--data", text, "--out", text / "run", "--device", "cpu", *settings, *more)


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_train_then_eval(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(text, "--epochs", 2, "--json") == 0
    trained = printed(capsys)
    assert trained["epochs"] == 2
    assert train(text, "--epochs", 3) == 0
    assert "going on from" in capsys.readouterr().err
    assert run("pru", "eval", text / "run", "--data", text, "--split", "valid", "--device", "cpu", "--json") == 0
    static = printed(capsys)
    assert static["num_tokens"] == 12 * 12 - 1
    assert static["perplexity"] == pytest.approx(math.exp(static["loss"]))
    assert static["perplexity_per_word"] == pytest.approx(static["perplexity"])
    assert static["published_perplexity"] == pytest.approx(math.exp(static["loss"] * 143 / 144))
    options = ["--dynamic", "--grid", "--grid-tokens", 20, "--json"]
    assert run("pru", "eval", text / "run", "--data", text, "--device", "cpu", *options) == 0
    dynamic = printed(capsys)["dynamic"]
    assert len(dynamic["grid"]) == 24
    assert dynamic["num_tokens"] == 143


def test_words_outside_the_vocabulary_are_counted(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(text, "--epochs", 1) == 0
    (text / "test.txt").write_text("the zebra sat\n")
    capsys.readouterr()
    assert run("pru", "eval", text / "run", "--data", text, "--device", "cpu") == 0
    assert "1 words are outside the vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "hiden_size=3"], 2, "unknown model setting: 'hiden_size'; did you mean hidden_size?"),
        (["--set", "lr"], 2, "--set wants NAME=VALUE"),
        (["--preset", "best"], 2, "preset must be one of standard, awd"),
        (["--set", "groups=3"], 2, "divisible by groups=3"),
        (["--set", "batch_size=100000"], 2, "too few for batch_size=100000"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert train(text, *arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert not (text / "run").exists()


@pytest.mark.skipif(find_spec("onnx") is None, reason="onnx is not installed")
def test_a_run_is_exported(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    assert train(text, "--epochs", 1) == 0
    capsys.readouterr()
    assert run("pru", "export", text / "run", "--onnx", text / "model.onnx", "--json") == 0
    assert printed(capsys)["bytes"] == (text / "model.onnx").stat().st_size
    taken = [value.name for value in onnx.load(text / "model.onnx").graph.input]
    assert taken == ["input_ids", *(f"past.{layer}.{part}" for layer in range(3) for part in "hc")]
    assert run("pru", "export", text / "run", "--onnx", text / "model.onnx", "--stateless") == 0
    assert [value.name for value in onnx.load(text / "model.onnx").graph.input] == ["input_ids"]
    assert run("pru", "export", text / "run", "--onnx", text / "nowhere" / "model.onnx") == 2
    assert "can't be written" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pru", "eval", text, "--data", text) == 4
    assert "has no model" in capsys.readouterr().err


def test_a_damaged_model_is_refused(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(text, "--epochs", 1) == 0
    file = text / "run" / "best" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert run("pru", "eval", text / "run", "--data", text) == 4
    assert "can't be loaded" in capsys.readouterr().err
