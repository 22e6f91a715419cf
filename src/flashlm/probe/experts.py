"""What a layer of experts costs beside weights and reads: its router, and the many small steps around the products."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from flashlm.probe.timing import Cold
from flashlm.rows import kernels

NUM_EXPERTS, NUM_ACTIVE, NUM_ROWS, WIDTH = 64, 8, 64, 64
GROUPS = (1, 4)
NUM_ROUNDS = 60


@torch.no_grad()
def expert_overheads_s() -> tuple[float, float]:
    """Return the time of (a layer of experts without groups, each group of experts computed together), for one token.

    The steps are the engine's, on next to no weights, once with all experts in one group and once in several.
    """
    cold = Cold()
    few, many = GROUPS
    with kernels.one_torch_thread():
        few_s, many_s = (cold.median_s(_layer(num_groups), NUM_ROUNDS) for num_groups in GROUPS)
    group_s = max(many_s - few_s, 0.0) / (many - few)
    return max(few_s - few * group_s, 0.0), group_s


class _layer:  # noqa: N801  # a function with its tensors
    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._router = torch.randn(NUM_EXPERTS, WIDTH, dtype=torch.bfloat16)
        self._weights = torch.zeros(NUM_EXPERTS, NUM_ROWS, 3 * WIDTH, dtype=torch.bfloat16)
        self._state = torch.randn(1, WIDTH, dtype=torch.bfloat16)

    def __call__(self) -> torch.Tensor:
        scores = F.softmax(F.linear(self._state, self._router), dim=-1, dtype=torch.float32)
        values, index = torch.topk(scores, NUM_ACTIVE, dim=-1)
        tokens, chosen = self._state.to(torch.float32).contiguous(), index.reshape(-1).tolist()
        places = {expert: place for place, expert in enumerate(chosen)}
        weights = values.reshape(-1, 1).to(torch.float32)
        experts = sorted(places)
        shares: dict[int, torch.Tensor] = {}
        for start in range(self._num_groups):
            group = experts[start :: self._num_groups]
            weighted = self._products(tokens, group) * weights[[places[expert] for expert in group]]
            shares.update(zip(group, weighted, strict=True))
        output = torch.zeros(1, WIDTH)
        for expert in experts:
            output += shares[expert]
        return output.to(torch.bfloat16)

    def _products(self, tokens: torch.Tensor, group: list[int]) -> torch.Tensor:
        stride_bytes = 2 * 3 * WIDTH
        blocks = [
            kernels.RowBlock(self._weights[expert].data_ptr(), NUM_ROWS, stride_bytes, WIDTH, torch.bfloat16, 3)
            for expert in group
        ]
        parts = [torch.empty(len(group), NUM_ROWS) for _ in range(2)]
        for number, part in enumerate(parts):
            kernels.project_blocks(tokens, blocks, number, part)
        gate, up = torch.cat(parts, dim=1).chunk(2, dim=-1)
        output = torch.zeros(len(group), WIDTH)
        kernels.accumulate_blocks((F.silu(gate) * up).contiguous(), blocks, output)
        return output
