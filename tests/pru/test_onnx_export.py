"""ONNX files run by onnxruntime against the modules they were made from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashlm.errors import ConfigError
from flashlm.pru import PRU, PRUConfig, PRUForCausalLM, export_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-5
SMALL = {"vocab_size": 50, "embedding_size": 16, "hidden_size": 24, "num_layers": 3, "groups": 2}


def served(model: PRU | PRUForCausalLM, path: Path, **options: Any) -> Any:
    export_onnx(model, path, **options)
    onnx.checker.check_model(path, full_check=True)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3, "batch_first": True, "levels": 3},
        {"num_layers": 2, "bidirectional": True, "subsampling": "conv", "dropout": 0.5},
        {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
        {"levels": 1, "groups": 1, "subsampling": "skip", "residual": False, "path": "grouped"},
    ],
    ids=str,
)
def test_a_module_is_the_same_at_any_batch_and_length(options: dict[str, Any], has_state: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pru = PRU(12, 12, **{"groups": 2, "init": "per_group", **options})
    with torch.no_grad():
        for parameter in pru.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    session = served(pru, tmp_path / "pru.onnx", has_state=has_state)  # made in train mode: dropout must not show
    pru.eval()
    for batch, steps in ((1, 1), (3, 7), (5, 2)):
        x = torch.randn((batch, steps, 12) if pru.batch_first else (steps, batch, 12))
        h, c = torch.randn(2, pru.num_layers * pru.num_directions, batch, 12)
        inputs = {"input": x, "h_0": h, "c_0": c} if has_state else {"input": x}
        with torch.no_grad():
            output, (h_n, c_n) = pru(x, (h, c) if has_state else None)
        got = run(session, inputs)
        for name, wanted in (("output", output), ("h_n", h_n), ("c_n", c_n)):
            torch.testing.assert_close(got[name], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("arch", ["pru", "lstm"])
def test_a_language_model_decodes_token_by_token(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PRUForCausalLM(PRUConfig(**SMALL, arch=arch, init="per_group")).eval()
    session = served(model, tmp_path / "model.onnx")
    tokens = torch.randint(1, 50, (2, 5))
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        logits = model(expected).logits
    sizes = [24, 24, 16]
    past = {f"past.{i}.{part}": torch.zeros(1, 2, size) for i, size in enumerate(sizes) for part in "hc"}
    made, fed = tokens, tokens
    for _ in range(6):
        got = run(session, {"input_ids": fed, **past})
        torch.testing.assert_close(got["logits"][:, -1], logits[:, made.shape[1] - 1], rtol=0, atol=TOLERANCE)
        past = {name.replace("present", "past"): value for name, value in got.items() if name != "logits"}
        fed = got["logits"][:, -1:].argmax(-1)
        made = torch.cat([made, fed], dim=1)
    assert torch.equal(made, expected)


def test_a_language_model_without_state_begins_at_zeros(tmp_path: Path) -> None:
    model = PRUForCausalLM(PRUConfig(**SMALL)).eval()
    session = served(model, tmp_path / "model.onnx", has_state=False)
    tokens = torch.randint(1, 50, (3, 4))
    with torch.no_grad():
        wanted = model(tokens)
    got = run(session, {"input_ids": tokens})
    torch.testing.assert_close(got["logits"], wanted.logits, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(got["present.2.c"], wanted.state[2][1], rtol=0, atol=TOLERANCE)


def test_tied_word_vectors_are_in_the_file_once(tmp_path: Path) -> None:
    model = PRUForCausalLM(PRUConfig(**{**SMALL, "vocab_size": 5000}))
    export_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 1.5 * 5000 * 16 * 4


def test_16_bit_weights_are_widened_and_the_module_is_left_alone(tmp_path: Path) -> None:
    pru = PRU(8, 8, groups=2, dtype=torch.bfloat16)
    session = served(pru, tmp_path / "pru.onnx", has_state=False)
    assert pru.cells[0].context_transform.weight.dtype == torch.bfloat16
    x = torch.randn(4, 2, 8)
    wanted, _ = pru.float()(x)
    torch.testing.assert_close(run(session, {"input": x})["output"], wanted, rtol=0, atol=TOLERANCE)


def test_what_can_not_be_exported_is_refused_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="not linear"):
        export_onnx(PRU(8, 8, subsampling="max"), tmp_path / "pru.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'flashlm\[onnx\]'"):
        export_onnx(PRU(8, 8), tmp_path / "pru.onnx")
    assert not list(tmp_path.iterdir())
