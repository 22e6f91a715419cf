"""Resident linear layers (attention, output) where torch's 16-bit products are slow: processors without bf16 products.

The same two ways as for streamed rows: our row kernels, in tiles, for tokens that are decoded or verified and for a few; and
for prompts the weights widened to fp32 piece by piece and multiplied there. Measured on AVX2, bf16, 4096 x 4096: torch
multiplies 128 tokens at 21 GFLOP/s, and at 80 in fp32; four tokens reach 5 GB/s in torch. Sums are fp32, rounded once.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from flashlm.engine.forward_pass import running_pass, tiles
from flashlm.errors import ConfigError
from flashlm.rows import kernels


class WideningLinear(nn.Linear):
    """An `nn.Linear` with 16-bit weights (out_features, in_features) that computes in fp32. Inference only."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input·weightᵀ + bias; (..., in_features) to (..., out_features), in the dtype of `input`.

        Raises:
            ConfigError: The input or the weight is on another device than the CPU.
        """
        if not (input.is_cpu and self.weight.is_cpu):
            raise ConfigError(
                f"a pack computes on the CPU, but an input is on {input.device}, a weight on {self.weight.device}"
            )
        if input.dtype == self.weight.dtype and input.numel() <= kernels.MAX_TOKENS * self.in_features:
            return kernels.linear(input, self.weight, self.bias)
        tokens = input.detach().reshape(-1, self.in_features)
        if len(tokens) > kernels.MAX_TOKENS and not _is_by_rows(input.shape):
            output = self._multiply(tokens.to(torch.float32).contiguous(), input.dtype)
        elif input.dtype == self.weight.dtype:
            output = torch.cat([kernels.linear(tokens[tile], self.weight, self.bias) for tile in tiles(len(tokens))])
        else:  # in another dtype
            tokens = tokens.to(torch.float32).contiguous()
            output = torch.empty(len(tokens), self.out_features, dtype=torch.float32)
            for tile in tiles(len(tokens)):
                kernels.project(tokens[tile], self._rows(0, self.out_features), 0, output[tile])
            if self.bias is not None:
                output += self.bias
        return output.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def _multiply(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the outputs of many tokens in `dtype`, rounded piece by piece: all in fp32 are twice as large."""
        output = torch.empty(len(tokens), self.out_features, dtype=dtype)
        step = max(kernels.WIDEN_PIECE_BYTES // (4 * max(self.in_features, len(tokens))), 1)
        scratch = torch.empty(min(step, self.out_features), self.in_features, dtype=torch.float32)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            kernels.widen(self._rows(start, stop), 0, scratch[: stop - start])
            piece = F.linear(tokens, scratch[: stop - start])
            if self.bias is not None:
                piece += self.bias[start:stop]
            output[:, start:stop] = piece
        return output

    def _rows(self, start: int, stop: int) -> kernels.RowBlock:
        stride_bytes = self.in_features * self.weight.element_size()
        address = self.weight.data_ptr() + start * stride_bytes
        return kernels.RowBlock(address, stop - start, stride_bytes, self.in_features, self.weight.dtype, 1)


def _is_by_rows(shape: torch.Size) -> bool:
    """Return whether an input (..., num_tokens, in_features) takes row kernels whatever its size.

    So do one token per sequence, as prompts end with for their logits, and passes that are not prompts.
    """
    running = running_pass()
    return shape[-2] == 1 or (running is not None and running.phase != "prompt")


class FoldedLinear(nn.Linear):
    """An `nn.Linear` that multiplies all tokens as one matrix, wherever they lie.

    torch multiplies tokens of several sequences one sequence at a time where they are not next to each other, as the last
    positions of a batch are, and copies the weights for each: eight times the output layer for a batch of eight.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input·weightᵀ + bias; (..., in_features) to (..., out_features)."""
        output = F.linear(input.reshape(-1, self.in_features), self.weight, self.bias)
        return output.view(*input.shape[:-1], self.out_features)


def fold_linears(model: nn.Module) -> None:
    """Make every plain `nn.Linear` of `model` a `FoldedLinear`, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FoldedLinear


def widen_linears(model: nn.Module) -> int:
    """Make every plain 16-bit `nn.Linear` of `model` a `WideningLinear`, in place; return how many there were.

    The modules and their weights stay the same objects, so tied weights stay tied.
    """
    num_changed = 0
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype.itemsize == 2 and module.weight.is_contiguous():
            module.__class__ = WideningLinear
            num_changed += 1
    return num_changed
