"""The module against the authors' semantics, the published parameter counts and the `nn.LSTM` it folds into."""

from __future__ import annotations

import copy
import pickle
import random
import shutil
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from flashlm.errors import ConfigError
from flashlm.pru import PRU, GroupedLinear, PRUCell, PyramidalTransform

TOLERANCE = 1e-5
SUBSAMPLINGS = ["average", "skip", "conv", "max"]


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("hidden", "groups", "expected"),
    [
        (1000, 1, (5_408_000, 7_508_000, 2_043_200)),
        (1200, 2, (4_569_600, 7_929_600, 2_003_200)),
        (1400, 4, (3_931_200, 8_831_200, 2_123_200)),
    ],
)
def test_layers_have_the_published_number_of_parameters(hidden: int, groups: int, expected: tuple[int, ...]) -> None:
    sizes = [(400, hidden), (hidden, hidden), (hidden, 400)]
    counts = [_num_parameters(PRU(*pair, groups=groups, device="meta")) for pair in sizes]
    assert tuple(counts) == expected


def test_pyramid_counts_zero_padding_and_pools_in_a_chain() -> None:
    transform = PyramidalTransform(8, 8, 3, residual=False)
    x = torch.randn(8)
    padded = torch.cat([torch.zeros(2), x, torch.zeros(2)])
    z2 = torch.stack([padded[2 * j : 2 * j + 5].sum() / 5 for j in range(4)])
    padded = torch.cat([torch.zeros(1), z2, torch.zeros(1)])
    z3 = torch.stack([padded[2 * j : 2 * j + 3].sum() / 3 for j in range(2)])
    by_hand = torch.cat([w @ z for w, z in zip(transform.weights, [x, z2, z3], strict=True)])
    assert transform.level_outputs == [5, 2, 1]
    torch.testing.assert_close(transform(x), by_hand)


def test_residual_is_added_to_all_gates_and_only_where_sizes_match() -> None:
    with_it, without = PyramidalTransform(8, 8, num_gates=4), PyramidalTransform(8, 8, num_gates=4, residual=False)
    without.load_state_dict(with_it.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(with_it(x) - without(x), x.repeat(1, 4))
    assert not PyramidalTransform(8, 12).has_residual


def test_groups_are_contiguous_and_never_mix() -> None:
    linear = GroupedLinear(6, 6, 3, num_gates=2)
    x = torch.zeros(6)
    x[2:4] = torch.randn(2)
    reached = linear(x).detach().view(2, 3, 2).abs().sum(dim=(0, 2)) > 0
    assert reached.tolist() == [False, True, False]


def test_initialisations_have_the_documented_scale() -> None:
    std = {
        init: GroupedLinear(64, 64, 4, num_gates=4, init=init).weight.detach().std().item()
        for init in ("code", "per_group")
    }
    assert std["code"] == pytest.approx(1 / 32, rel=0.05)  # 1 / (2 d)
    assert std["per_group"] == pytest.approx(1 / 8, rel=0.05)  # 1 / sqrt(4 d)


def _random_case(seed: int) -> dict[str, object]:
    draw = random.Random(seed)
    levels, groups = draw.randint(1, 4), draw.choice([1, 2, 3, 4])
    unit = 2 ** (levels - 1) * groups * 4
    hidden = unit * draw.randint(1, 2)
    return {
        "input_size": hidden if draw.random() < 0.5 else 8 * draw.randint(2, 5),
        "hidden_size": hidden,
        "num_layers": draw.randint(1, 2),
        "bias": draw.random() < 0.8,
        "batch_first": draw.random() < 0.5,
        "bidirectional": draw.random() < 0.4,
        "groups": groups,
        "levels": levels,
        "split": draw.choice(["code", "equal"]),
        "subsampling": draw.choice(["average", "skip", "conv"]),
        "residual": draw.random() < 0.7,
        "init": "per_group",
    }


def _loss(output: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return output.square().sum() + h.sum() + c.square().sum()


def _assert_same_gradients(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> None:
    """Each within 1e-5 of its largest entry: gradients reach 75 here, where fp32 itself is no finer than 5e-6."""
    assert len(one) == len(other)
    for got, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE * wanted.abs().max().item())


@pytest.mark.parametrize("seed", range(24))
def test_every_path_equals_the_folded_lstm_with_gradients(seed: int) -> None:
    torch.manual_seed(seed)
    options = _random_case(seed)
    pru = PRU(**options, path="grouped")  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in pru.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    lstm = pru.to_lstm()
    x = torch.randn(5, 3, pru.input_size)
    size = (pru.num_layers * pru.num_directions, x.shape[0 if pru.batch_first else 1], pru.hidden_size)
    state = (torch.randn(size), torch.randn(size))
    inputs = [value.requires_grad_() for value in (x, *state)]
    expected, (h, c) = lstm(x, state)
    of_inputs, of_parameters = [torch.autograd.grad(_loss(expected, h, c), inputs)], []
    for path in ("grouped", "folded"):
        pru.path = path  # type: ignore[assignment]
        output, (h_n, c_n) = pru(x, state)
        for got, wanted in ((output, expected), (h_n, h), (c_n, c)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
        gradients = torch.autograd.grad(_loss(output, h_n, c_n), [*inputs, *pru.parameters()])
        of_inputs.append(gradients[: len(inputs)])
        of_parameters.append(gradients[len(inputs) :])
    for one in of_inputs[1:]:
        _assert_same_gradients(one, of_inputs[0])
    _assert_same_gradients(*of_parameters)
    pru.path = "native"
    with torch.no_grad():
        output, (_, c_n) = pru(x, state)
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(c_n, c, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_gradients_of_the_time_loop_are_right(subsampling: str) -> None:
    torch.manual_seed(0)
    pru = PRU(8, 8, groups=2, levels=3, subsampling=subsampling, init="per_group", dtype=torch.float64)  # type: ignore[arg-type]
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    state = [torch.randn(1, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    names = [name for name, _ in pru.named_parameters()]

    def run(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output, last = torch.func.functional_call(pru, dict(zip(names, values, strict=True)), (x, (h, c)))
        return output, *last

    torch.autograd.gradcheck(run, (x, *state, *pru.parameters()))


def test_cell_steps_equal_the_sequence() -> None:
    pru = PRU(8, 8, groups=2)
    x = torch.randn(4, 3, 8)
    cell, state, outputs = pru.cells[0], None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0])
    torch.testing.assert_close(pru(x)[0], torch.stack(outputs))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_equal_nn_lstm(bidirectional: bool) -> None:
    torch.manual_seed(0)
    pru = PRU(8, 8, 2, bidirectional=bidirectional, groups=2, init="per_group", dtype=torch.float64)
    x = torch.randn(6, 4, 8, dtype=torch.float64, requires_grad=True)
    packed = pack_padded_sequence(x, torch.tensor([2, 6, 4, 6]), enforce_sorted=False)
    state = tuple(torch.randn(2 * (1 + bidirectional), 4, 8, dtype=torch.float64) for _ in range(2))
    got, got_state = pru(packed, state)
    wanted, wanted_state = pru.to_lstm()(packed, state)
    assert isinstance(got, PackedSequence)
    torch.testing.assert_close(got.data, wanted.data)
    torch.testing.assert_close(got_state, wanted_state)
    one, other = (
        torch.autograd.grad(y.data.square().sum() + s[1].sum(), x, retain_graph=True)[0]
        for y, s in ((got, got_state), (wanted, wanted_state))
    )
    torch.testing.assert_close(one, other)
    assert torch.equal(pad_packed_sequence(got)[1], torch.tensor([2, 6, 4, 6]))


def test_unbatched_and_batch_first_are_the_same_numbers() -> None:
    pru = PRU(8, 8, groups=2)
    x = torch.randn(5, 8)
    output, (h, c) = pru(x)
    assert output.shape == (5, 8)
    assert h.shape == c.shape == (1, 8)
    pru.batch_first = True
    torch.testing.assert_close(pru(x.unsqueeze(0))[0].squeeze(0), output)


def test_code_written_for_nn_lstm_runs() -> None:
    pru = PRU(8, 8, 2, bidirectional=True, dropout=0.5, groups=2).eval()
    pru.flatten_parameters()
    assert "bidirectional=True" in repr(pru)
    x = torch.randn(5, 3, 8)
    expected, _ = pru(x)
    for twin in (copy.deepcopy(pru), pickle.loads(pickle.dumps(pru))):
        assert torch.equal(twin(x)[0], expected)
    other = PRU(8, 8, 2, bidirectional=True, groups=2)
    other.load_state_dict(pru.state_dict())
    assert torch.equal(other(x)[0], expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert copy.deepcopy(pru).to(dtype)(x.to(dtype))[0].dtype == dtype
    pru.train()
    assert not torch.equal(pru(x)[0], pru(x)[0])  # dropout between the layers


@pytest.mark.parametrize("grad", [True, False])
def test_a_batch_of_no_sequences_gives_none(grad: bool) -> None:
    pru = PRU(8, 8, groups=2)
    with torch.set_grad_enabled(grad):
        output, (h, c) = pru(torch.randn(5, 0, 8))
    assert output.shape == (5, 0, 8)
    assert h.shape == c.shape == (1, 0, 8)


def test_parametrized_weights_are_used_on_every_path() -> None:
    pru = PRU(8, 8, groups=2, init="per_group")
    x = torch.randn(2, 3, 8)
    context = pru.cells[0].context_transform
    nn.utils.parametrizations.weight_norm(context, "weight")
    paths = ("grouped", "folded", "native")

    def outputs() -> list[torch.Tensor]:
        values = []
        for path in paths:
            pru.path = path  # type: ignore[assignment]
            values.append(pru(x)[0])
        return values

    for path in ("grouped", "folded"):
        pru.path = path  # type: ignore[assignment]
        pru.zero_grad()
        pru(x)[0].sum().backward()
        assert context.parametrizations.weight.original0.grad is not None
    with torch.no_grad():
        before = outputs()
        context.parametrizations.weight.original0.mul_(3)
        after = outputs()
    for one, other in zip(before, after, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(other, after[0], rtol=0, atol=TOLERANCE)


def test_weights_made_in_inference_mode_serve() -> None:
    with torch.inference_mode():
        pru = PRU(8, 8, groups=2).eval()
        assert pru(torch.randn(1, 1, 8))[0].shape == (1, 1, 8)


def _largest_difference_compiled(backend: str) -> float:
    torch._dynamo.reset()
    pru = PRU(8, 8, groups=2, init="per_group")
    compiled = torch.compile(pru, backend=backend, fullgraph=True)
    x = torch.randn(4, 3, 8)
    gradients = []
    for run in (compiled, pru):
        pru.zero_grad()
        run(x)[0].square().sum().backward()
        gradients.append([p.grad for p in pru.parameters()])
    differences = [(one - other).abs().max() for one, other in zip(*gradients, strict=True)]  # type: ignore[operator]
    with torch.no_grad():
        differences.append((compiled(x)[0] - pru(x)[0]).abs().max())
    return max(d.item() for d in differences)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend: str) -> None:
    assert _largest_difference_compiled(backend) <= TOLERANCE


def test_compiles_into_one_graph_under_autocast() -> None:
    torch._dynamo.reset()
    pru = PRU(8, 8, groups=2, init="per_group")
    x = torch.randn(4, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output, (_, c) = torch.compile(pru, backend="aot_eager", fullgraph=True)(x)
        expected, _ = pru(x)
    assert c.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor() -> None:
    assert _largest_difference_compiled("inductor") <= TOLERANCE


def test_weight_dropout_changes_outputs_and_gives_gradients() -> None:
    for path in ("grouped", "folded"):
        pru = PRU(8, 8, groups=2, init="per_group", weight_dropout=0.5, path=path)  # type: ignore[arg-type]
        x = torch.randn(5, 2, 8)
        first, second = pru(x)[0], pru(x)[0]
        assert not torch.equal(first, second)  # a fresh mask on every call
        first.sum().backward()
        gradient = pru.cells[0].context_transform.weight.grad
        assert gradient is not None
        assert 0.2 < float((gradient == 0).float().mean()) < 0.8
        pru.eval()
        assert torch.equal(pru(x)[0], pru(x)[0])


@pytest.mark.parametrize(("path", "multiplies"), [("grouped", True), ("grouped", False), ("folded", False)])
def test_bf16_autocast_keeps_the_cell_state_in_fp32(
    path: str, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pru = PRU(32, 32, groups=4, init="per_group", path=path)  # type: ignore[arg-type]
    if multiplies:
        monkeypatch.setattr("flashlm.pru.module.emulates_16_bits", lambda device_type: False)
    x = torch.randn(20, 4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output, (_, c) = pru(x.bfloat16())
        output.float().sum().backward()
    assert c.dtype == torch.float32
    torch.testing.assert_close(output.float(), pru(x)[0], rtol=0, atol=0.05)
    gradient = pru.cells[0].context_transform.weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_step_takes_16_bit_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pru = PRU(64, 64, groups=4, init="per_group", dtype=dtype, path="native").eval()
    x = torch.randn(2, 3, 64, dtype=dtype)
    with torch.no_grad():
        output, _ = pru(x)
        wide = copy.deepcopy(pru).float()
        wide.path = "grouped"
        expected, _ = wide(x.float())
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.01)


def test_native_step_notices_changed_weights() -> None:
    pru = PRU(8, 8, groups=2, path="native").eval()
    x = torch.randn(1, 1, 8)
    with torch.no_grad():
        before, _ = pru(x)
        pru.cells[0].input_transform.biases[0].add_(1.0)
        after, _ = pru(x)
        pru.path = "grouped"
        expected, _ = pru(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("size", "groups", "batch", "steps", "is_training", "expected"),
    [
        (128, 4, 20, 70, True, "folded"),
        (128, 4, 20, 70, False, "folded"),
        (1400, 4, 20, 70, True, "grouped"),
        (1400, 1, 20, 70, True, "folded"),
        (1400, 1, 1, 70, True, "grouped"),
        (128, 4, 20, 1, True, "grouped"),
        (128, 4, 1, 1, False, "native"),
        (1400, 4, 8, 1, False, "native"),
        (400, 4, 1, 16, False, "grouped"),
        (900, 2, 20, 70, True, "folded"),
        (128, 4, 0, 70, True, "grouped"),
    ],
)
def test_auto_takes_the_path_that_was_measured_faster(
    size: int, groups: int, batch: int, steps: int, is_training: bool, expected: str
) -> None:
    pru = PRU(size, size, groups=groups, device="meta").to_empty(device="cpu")
    with torch.set_grad_enabled(is_training):
        x = torch.empty(steps, batch, size)
        assert pru._path(pru.cells[0], x, None) == expected
        assert pru._path(pru.cells[0], x, torch.ones(steps, batch)) == "grouped"
        assert pru._path(pru.cells[0], x.double(), None) != "folded"  # not measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 8, "hidden_size": 10, "groups": 4}, "hidden_size must be divisible by groups=4, got 10"),
        ({"input_size": 6, "hidden_size": 8, "levels": 3}, "input_size must be divisible by 4, got 6"),
        ({"input_size": 8, "hidden_size": 8, "proj_size": 4}, "proj_size must be 0"),
        ({"input_size": 8, "hidden_size": 8, "split": "half"}, "split must be one of code, equal"),
        ({"input_size": 8, "hidden_size": 8, "dropout": 1.5}, "dropout must be from 0 to 1"),
        ({"input_size": 8, "hidden_size": 8, "subsampling": "max", "path": "folded"}, "not linear"),
        ({"input_size": 8, "hidden_size": 0}, "hidden_size must be a positive integer"),
    ],
)
def test_wrong_sizes_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PRU(**arguments)  # type: ignore[arg-type]


def test_wrong_inputs_are_refused() -> None:
    pru = PRU(8, 8)
    with pytest.raises(ConfigError, match="8 features"):
        pru(torch.randn(3, 2, 7))
    with pytest.raises(ConfigError, match=r"input is torch\.float64 and the weights are torch\.float32"):
        pru(torch.randn(3, 2, 8, dtype=torch.float64))
    with pytest.raises(ConfigError, match="no steps"):
        pru(torch.randn(0, 2, 8))
    with pytest.raises(ConfigError, match="hx must be two tensors"):
        pru(torch.randn(3, 2, 8), (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)))
    for state in (torch.zeros(1, 2, 8), (torch.zeros(1, 2, 8),), (torch.zeros(1, 2, 8), None), "h"):
        for module, x in ((pru, torch.randn(3, 2, 8)), (pru, torch.randn(3, 8)), (PRUCell(8, 8), torch.randn(2, 8))):
            with pytest.raises(ConfigError, match=r"hx must be two tensors, \(h, c\), got"):
                module(x, state)
    with pytest.raises(ConfigError, match="features"):
        GroupedLinear(8, 8)(torch.randn(3, 4))
    with pytest.raises(ConfigError, match="input must be"):
        PRUCell(8, 8)(torch.randn(2, 2, 8))
    pru.path = "native"
    with pytest.raises(ConfigError, match="native"):
        pru(torch.randn(3, 2, 8))
