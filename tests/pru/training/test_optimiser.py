"""SGD that becomes ASGD, against torch's own."""

from __future__ import annotations

import torch

from flashlm.pru.training.optimiser import AveragingSGD

LEARNING_RATES = [30.0, 15.0, 27.5, 31.0, 8.0, 30.0]  # as windows of different lengths scale it


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, generator=generator) * 1e-2 for _ in LEARNING_RATES]


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))


def trajectory(make: type[torch.optim.Optimizer], **options: float) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    weight = parameter()
    optimiser = make([weight], lr=30.0, weight_decay=1e-3, **options)  # type: ignore[call-arg]
    for lr, gradient in zip(LEARNING_RATES, gradients(), strict=True):
        optimiser.param_groups[0]["lr"] = lr
        weight.grad = gradient.clone()
        optimiser.step()
    return weight.detach(), optimiser


def ours(is_averaging: bool) -> tuple[torch.nn.Parameter, AveragingSGD]:
    weight = parameter()
    optimiser = AveragingSGD([weight], 1e-3)
    if is_averaging:
        optimiser.start_averaging()
    for lr, gradient in zip(LEARNING_RATES, gradients(), strict=True):
        weight.grad = gradient.clone()
        optimiser.step(lr)
    return weight, optimiser


def test_steps_before_averaging_are_those_of_sgd() -> None:
    expected, _ = trajectory(torch.optim.SGD)
    torch.testing.assert_close(ours(False)[0].detach(), expected, rtol=0, atol=0)


def test_steps_and_mean_are_those_of_asgd_with_its_late_learning_rate() -> None:
    expected, reference = trajectory(torch.optim.ASGD, t0=0, lambd=0.0)
    weight, optimiser = ours(True)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-6)
    assert optimiser.averages is not None
    (state,) = reference.state.values()
    torch.testing.assert_close(optimiser.averages[0], state["ax"], rtol=1e-6, atol=1e-6)


def test_weights_are_their_mean_only_while_asked() -> None:
    weight, optimiser = ours(True)
    before = weight.detach().clone()
    assert optimiser.averages is not None
    with optimiser.averaged():
        assert torch.equal(weight, optimiser.averages[0])
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_without_a_mean_the_weights_stay() -> None:
    weight = parameter()
    optimiser = AveragingSGD([weight], 0.0)
    optimiser.start_averaging()  # and no step yet
    with optimiser.averaged():
        assert torch.equal(weight, parameter())
