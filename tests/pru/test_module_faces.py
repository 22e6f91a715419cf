"""Where a `PRU` stands in for `nn.LSTM`: weights changed behind torch's back, export, initialising anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flashlm.errors import ConfigError
from flashlm.pru import PRU, PRUCell, PRUConfig, PRUForCausalLM

TOLERANCE = 1e-5


def _by_data(parameter: nn.Parameter) -> None:
    parameter.data.mul_(-2)


def _by_data_copy(parameter: nn.Parameter) -> None:
    parameter.data.copy_(parameter.data * 3 + 0.1)


def _by_numpy(parameter: nn.Parameter) -> None:
    if parameter.dtype == torch.bfloat16:  # which numpy does not have
        parameter.data.view(torch.int16).numpy()[...] ^= -0x8000
    else:
        parameter.detach().numpy()[...] *= -2


def _one_value_by_numpy(parameter: nn.Parameter) -> None:
    flat = parameter.data.view(torch.int16).numpy() if parameter.dtype == torch.bfloat16 else parameter.data.numpy()
    flat.reshape(-1)[-1] += np.asarray(64).astype(flat.dtype)


def _by_storage(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * -2  # elsewhere, and the old memory is free


def _by_sharing(parameter: nn.Parameter) -> None:
    parameter.share_memory_()
    parameter.data.mul_(-2)


def _by_transposing(parameter: nn.Parameter) -> None:
    parameter.data = (parameter.data * -2).transpose(0, -1).contiguous().transpose(0, -1)


CHANGES = [_by_data, _by_data_copy, _by_numpy, _one_value_by_numpy, _by_storage, _by_sharing, _by_transposing]
SERVED = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("change", CHANGES)
def test_inference_uses_weights_however_they_were_changed(
    change: Callable[[nn.Parameter], None], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    pru = PRU(16, 16, 2, groups=2, init="per_group").eval().to(dtype)
    x = torch.randn(1, 2, 16, dtype=dtype)
    state = (torch.randn(2, 2, 16, dtype=dtype), torch.randn(2, 2, 16, dtype=dtype))
    with torch.no_grad():
        for name, parameter in pru.named_parameters():
            before, _ = pru(x, state)
            change(parameter)
            after, (_, c) = pru(x, state)
            twin = copy.deepcopy(pru).double()
            twin.path = "grouped"
            expected, (_, c_expected) = twin(x.double(), (state[0].double(), state[1].double()))
            tolerance = 1e-4 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(after.double(), expected, rtol=0, atol=tolerance, msg=name)
            torch.testing.assert_close(c.double(), c_expected, rtol=tolerance, atol=tolerance, msg=name)
            is_changed = not torch.equal(before, after)
            assert is_changed or change is _one_value_by_numpy or bool((parameter == 0).all()), name


def test_the_native_path_reads_weights_that_came_from_inference_mode() -> None:
    with torch.inference_mode():
        pru = PRU(8, 8, groups=2, path="native").eval()
        x = torch.randn(1, 1, 8)
        before, _ = pru(x)
        pru.cells[0].input_transform.weights[0].mul_(-3)
        after, _ = pru(x)
        pru.path = "grouped"
        torch.testing.assert_close(after, pru(x)[0], rtol=0, atol=TOLERANCE)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_shows_at_once_even_with_a_state_of_zeros(value: float) -> None:
    pru = PRU(8, 8, groups=2, path="native").eval()
    with torch.no_grad():
        pru.cells[0].context_transform.weight[0, 1, 2] = value
        assert pru(torch.randn(1, 1, 8))[0].isnan().any()


def test_native_refuses_weights_that_are_no_rows_and_auto_serves_them() -> None:
    pru = PRU(8, 8, groups=2, path="native").eval()
    x = torch.randn(1, 1, 8)
    with torch.no_grad():
        expected, _ = pru(x)
        weight = pru.cells[0].context_transform.weight
        weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
        with pytest.raises(ConfigError, match="plain contiguous CPU weights"):
            pru(x)
        pru.path = "auto"
        torch.testing.assert_close(pru(x)[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("path", ["auto", "grouped", "folded"])
@pytest.mark.parametrize("grad", [True, False])
def test_exports(path: str, grad: bool) -> None:
    pru = PRU(32, 64, 2, bidirectional=True, init="per_group", path=path).eval()  # type: ignore[arg-type]
    x = torch.randn(4, 2, 32)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(pru, (x,)).module()
    x = torch.randn(4, 2, 32)
    for got, wanted in zip(nn.utils.parameters_to_vector([exported(x)[0]]), pru(x)[0].flatten(), strict=True):
        assert got.item() == pytest.approx(wanted.item(), abs=TOLERANCE)


def test_exports_a_language_model_with_state_and_mask() -> None:
    torch.manual_seed(0)
    config = PRUConfig(vocab_size=20, embedding_size=8, hidden_size=8, num_layers=2, groups=2, init="per_group")
    model = PRUForCausalLM(config).eval()
    tokens = torch.randint(0, 20, (2, 4))
    with torch.no_grad():
        given = {"attention_mask": torch.ones(2, 4, dtype=torch.long), "state": model(tokens).state}
    exported = torch.export.export(model, (tokens,), given).module()
    given["attention_mask"][0, 0] = 0
    expected = model(tokens, **given)
    got = exported(tokens, **given)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(got.state[0][1], expected.state[0][1], rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore")  # torch's: this exporter is deprecated, and tracing takes shapes for constants
def test_torchs_own_onnx_export_serves_where_auto_folds(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pru = PRU(16, 16, groups=2, init="per_group", path="folded").eval()
    x = torch.randn(5, 2, 16)
    path = tmp_path / "pru.onnx"
    torch.onnx.export(pru, (x,), path, dynamo=False, input_names=["x"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got, *_) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), pru(x)[0].detach(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("subsampling", ["average", "conv"])
def test_a_module_from_the_meta_device_is_initialised_by_reset_parameters(subsampling: Any) -> None:
    for make in (PRU, PRUCell):
        filled = make(32, 32, groups=2, subsampling=subsampling, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            for parameter in filled.parameters():
                parameter.fill_(float("nan"))
        torch.manual_seed(0)
        filled.reset_parameters()
        torch.manual_seed(0)
        fresh = make(32, 32, groups=2, subsampling=subsampling)
        for (name, got), wanted in zip(filled.named_parameters(), fresh.parameters(), strict=True):
            assert torch.equal(got, wanted), name


def test_what_code_for_nn_lstm_asks_for_is_there() -> None:
    pru = PRU(8, 8, 2, bidirectional=True, groups=2, dropout=1.0)
    assert pru.proj_size == 0
    assert len(pru.all_weights) == 4
    assert [id(each) for group in pru.all_weights for each in group] == [id(each) for each in pru.parameters()]
    x = torch.randn(5, 2, 8)
    above = pru(x)[0]  # the second layer sees zeros
    other = pru(torch.randn(5, 2, 8))[0]
    assert torch.equal(above, other)
    assert not torch.equal(pru.eval()(x)[0], above)


def test_masked_sequences_equal_those_without_padding() -> None:
    torch.manual_seed(0)
    pru = PRU(8, 8, 2, bidirectional=True, groups=2, init="per_group")
    x = torch.randn(6, 2, 8)
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[:2, 0] = mask[4, 0] = False
    outputs, (h, c) = pru.forward_masked(x, None, mask)
    for row in range(2):
        alone, (h_alone, c_alone) = pru(x[mask[:, row], row])
        torch.testing.assert_close(outputs[mask[:, row], row], alone, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(h[:, row], h_alone, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(c[:, row], c_alone, rtol=0, atol=TOLERANCE)
    with pytest.raises(ConfigError, match="mask bool"):
        pru.forward_masked(x, None, mask.long())
