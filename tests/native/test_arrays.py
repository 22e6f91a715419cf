"""What native calls take as arrays, by DLPack's exchange table and, where a type has none, by `__dlpack__`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from flashlm import _native
from flashlm.errors import ConfigError
from flashlm.rows import kernels

FP32 = 2


class OlderTensor(torch.Tensor):
    """A tensor of a torch that has no exchange table."""

    __dlpack_c_exchange_api__ = None


KINDS = {
    "tensor": lambda array: torch.from_numpy(array),
    "parameter": lambda array: nn.Parameter(torch.from_numpy(array)),  # wants gradients
    "older": lambda array: torch.from_numpy(array).as_subclass(OlderTensor),
    "older parameter": lambda array: torch.from_numpy(array).as_subclass(OlderTensor).requires_grad_(),
    "numpy": lambda array: array,
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_arrays_are_read_and_written_where_they_lie(kind: str) -> None:
    make = KINDS[kind]
    content = np.arange(60, dtype=np.float32).reshape(6, 10)
    rows = _native.RowBlock(make(content), 6, _native.RowFormat.alike(40, 5, FP32, 2))
    target = np.full((6, 5), np.nan, dtype=np.float32)
    _native.widen(rows, 1, make(target))
    assert (target == content[:, 5:]).all()
    part = make(np.zeros((6, 5), dtype=np.float32))
    for bad in (
        make(np.zeros((6, 5))),
        make(np.zeros((6, 4), dtype=np.float32)),
        make(np.zeros((5, 6), dtype=np.float32).T),
    ):
        with pytest.raises(ConfigError, match=r"dst must be contiguous float32 \(6, 5\), got .*float.*\(\d, \d\)"):
            _native.widen(rows, 1, bad)
    del part


def test_strides_offsets_and_sizes_are_those_of_the_view() -> None:
    whole = torch.arange(24.0).view(4, 6)
    dst = torch.empty(2, 3)
    kernels.widen(kernels.matrix_rows(whole[1:3, 2:5]), 0, dst)
    assert torch.equal(dst, whole[1:3, 2:5])
    out = torch.full((3, 8), float("nan"))
    kernels.project(torch.ones(3, 6), kernels.matrix_rows(whole), 0, out[:, 2:6])
    assert torch.equal(out[:, 2:6], whole.sum(1).expand(3, 4))
    assert out[:, [0, 1, 6, 7]].isnan().all()


def test_what_is_no_array_in_memory_is_refused() -> None:
    rows = kernels.matrix_rows(torch.zeros(2, 3))
    for bad in (torch.zeros(2, 3, device="meta"), torch.zeros(2, 3).to_sparse(), "text", 7, [[0.0] * 3] * 2):
        with pytest.raises(ConfigError, match="dst must be"):
            _native.widen(rows, 0, bad)
