"""One layer as the authors' released code computes it, operation by operation, for comparison. Own words, their steps.

Everything happens inside the time loop: pooling, one product per level, each gate cut out and joined on its own, the
residual added to each; the context split, joined along the group axis, multiplied as a batch, its bias added, each gate
made contiguous; then unfused gates. (Read in the authors' `PRU.py` and `PRUTransforms.py`.) Gates lie in the order
f, g, i, o there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flashlm.pru import PRU

GATES_FROM_OURS = (1, 2, 0, 3)  # f, g, i, o out of i, f, g, o


class PublishedPRU(nn.Module):
    """Takes the weights of a one-layer `PRU`; (T, B, N) and h, c (1, B, M) → outputs (T, B, M) and (h, c)."""

    def __init__(self, pru: PRU) -> None:
        super().__init__()
        cell = pru.cells[0]
        pyramid, context = cell.input_transform, cell.context_transform
        self.kernel_sizes = [1, *pyramid.kernel_sizes]
        self.levels = nn.ModuleList()
        for weight, bias in zip(pyramid.weights, pyramid.biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                linear.weight.copy_(_reordered(weight, 0))
                linear.bias.copy_(_reordered(bias, 0))
            self.levels.append(linear)
        self.group_size = context.weight.shape[1]
        self.weight = nn.Parameter(_reordered(context.weight.detach(), 2))
        self.bias = nn.Parameter(_reordered(context.bias.detach(), 1))

    def forward(
        self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        h, c = state
        by_sequence = x.transpose(0, 1)
        outputs = []
        for t in range(by_sequence.shape[1]):
            from_input = self._pyramid(by_sequence[:, t].unsqueeze(1))
            from_context = self._grouped(h)
            f, g, i, o = (one + other for one, other in zip(from_input, from_context, strict=True))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, 1).squeeze(0), (h, c)

    def _pyramid(self, z: torch.Tensor) -> list[torch.Tensor]:
        gates: list[torch.Tensor] = []
        original = z.squeeze(1).clone()
        for level, linear in enumerate(self.levels):
            if level:
                size = self.kernel_sizes[level]
                z = F.avg_pool1d(z, kernel_size=size, stride=2, padding=(size - 1) // 2)
            parts = torch.chunk(linear(z.reshape(-1, z.shape[2])), 4, dim=1)
            gates = [torch.cat(pair, 1) for pair in zip(gates, parts, strict=True)] if level else list(parts)
        if original.shape == gates[0].shape:
            gates = [gate + original for gate in gates]
        return gates

    def _grouped(self, h: torch.Tensor) -> list[torch.Tensor]:
        batch = h.shape[1]
        by_group = torch.cat(torch.split(h, self.group_size, dim=2), 0)
        out = torch.bmm(by_group, self.weight).transpose(0, 1) + self.bias
        return [gate.contiguous().view(batch, -1) for gate in torch.split(out, self.group_size, dim=2)]


def _reordered(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    gates = tensor.chunk(4, dim=dim)
    return torch.cat([gates[position] for position in GATES_FROM_OURS], dim=dim)
