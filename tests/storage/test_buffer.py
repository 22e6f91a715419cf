"""Aligned memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from flashlm.storage.reader import AlignedBuffer


@pytest.mark.parametrize("huge_pages", [True, False])
@pytest.mark.parametrize("num_bytes", [0, 1, 4097, (2 << 20) - 1, 2 << 20, (5 << 20) + 3])
def test_buffer_is_aligned_zeroed_and_writable_to_its_end(num_bytes: int, huge_pages: bool) -> None:
    buffer = AlignedBuffer(num_bytes, huge_pages=huge_pages)
    array = buffer.numpy()
    assert array.ctypes.data % (2 << 20 if huge_pages and num_bytes >= 2 << 20 else 4096) == 0
    assert (array.dtype, array.shape, buffer.num_bytes) == (np.uint8, (num_bytes,), num_bytes)
    assert not array.any()
    array[:] = 255
    assert int(buffer.numpy().sum()) == 255 * num_bytes


def test_array_keeps_the_memory_of_a_dropped_buffer() -> None:
    buffer = AlignedBuffer(3 << 20)
    array = buffer.numpy()[5:]
    array[:] = 7
    del buffer
    gc.collect()
    others = [AlignedBuffer(3 << 20) for _ in range(4)]
    for other in others:
        other.numpy()[:] = 1
    assert (array == 7).all()


@pytest.mark.parametrize("num_bytes", [2**64 - 1, 2**64 - 4096, 2**63, 2**62])
def test_buffer_larger_than_the_address_space_is_refused(num_bytes: int) -> None:
    with pytest.raises(MemoryError):
        AlignedBuffer(num_bytes)
