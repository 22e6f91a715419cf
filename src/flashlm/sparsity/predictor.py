"""The row predictor: d → R → d_ff on the FFN's input, no non-linearity, one threshold (paper §3.1, Fig 3b).

Its two products run on the row kernels, so that a token is predicted alike alone and in a batch. Two kinds share this
form: one is trained on which neurons fired; the other is a low-rank sketch of the trigger's own weights, which needs no
training, and whose score is therefore an estimate of the activation itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashlm.errors import PackError
from flashlm.rows import kernels
from flashlm.sparsity.calibration_document import PredictorEntry, predictor_names

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Says which rows of a layer a token needs.

    Attributes:
        entry: Kind, rank and threshold.
        reduce: (rank, d_model) in bf16, fp16 or fp32, contiguous.
        expand: (d_ff, rank) likewise.
        bias: (d_ff,) fp32.
        activation: Of the layer; a sketch applies it to its estimate.
    """

    entry: PredictorEntry
    reduce: torch.Tensor
    expand: torch.Tensor
    bias: torch.Tensor
    activation: Activation

    @property
    def num_bytes(self) -> int:
        """DRAM that it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.reduce, self.expand, self.bias))

    @property
    def cutoff(self) -> float:
        """The value of `scores` above which a row is predicted: a probability's logit, a sketch's magnitude."""
        threshold = self.entry.threshold
        return math.log(threshold / (1.0 - threshold)) if self.entry.kind == "trained" else threshold

    def scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return a score per row, to be compared with `cutoff`.

        Args:
            tokens: fp32 (num_tokens, d_model), the FFN's input, contiguous.

        Returns:
            fp32 (num_tokens, d_ff).
        """
        scores = torch.empty(len(tokens), len(self.expand), dtype=torch.float32)
        for start in range(0, len(tokens), kernels.MAX_TOKENS):
            some = tokens[start : start + kernels.MAX_TOKENS]
            reduced = torch.empty(len(some), len(self.reduce), dtype=torch.float32)
            kernels.project(some, _rows(self.reduce), 0, reduced)
            kernels.project(reduced, _rows(self.expand), 0, scores[start : start + len(some)], self.bias)
        return scores if self.entry.kind == "trained" else self.activation(scores).abs()

    def predict(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the predicted rows as bool (num_tokens, d_ff); `tokens` as for `scores`."""
        return self.scores(tokens) > self.cutoff


def load_predictor(
    layer: int,
    entry: PredictorEntry,
    tensors: dict[str, torch.Tensor],
    *,
    hidden_size: int,
    num_rows: int,
    activation: Activation,
) -> Predictor:
    """Return the predictor of `layer` from a pack's tensors.

    Raises:
        PackError: A tensor is missing or of another shape than the layer needs.
    """
    shapes = ((entry.rank, hidden_size), (num_rows, entry.rank), (num_rows,))
    found = []
    for name, shape in zip(predictor_names(layer), shapes, strict=True):
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            got = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise PackError(f"the predictor's tensor {name} is {got}, {shape} expected: run `flashlm calibrate` again")
        found.append(tensor.contiguous())
    reduce, expand, bias = found
    if reduce.dtype != expand.dtype:
        raise PackError(f"the predictor of layer {layer} mixes {reduce.dtype} and {expand.dtype}: calibrate again")
    return Predictor(entry=entry, reduce=reduce, expand=expand, bias=bias.float(), activation=activation)


def _rows(matrix: torch.Tensor) -> kernels.RowBlock:
    num_rows, width = matrix.shape
    return kernels.RowBlock(matrix.data_ptr(), num_rows, width * matrix.element_size(), width, matrix.dtype, 1)
