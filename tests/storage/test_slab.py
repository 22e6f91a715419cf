"""Slabs and places in them: geometry, lifetime, what is charged to the budget, and what is refused."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashlm.errors import BudgetError, ConfigError
from flashlm.rows import kernels
from flashlm.storage.slab import Budget, SlabAllocator

MIB = 1 << 20


@given(
    slot_bytes=st.integers(1, 5000), num_slots=st.integers(1, 20), slot=st.integers(0, 19), offset=st.integers(0, 6000)
)
def test_places_are_apart_and_inside(slot_bytes: int, num_slots: int, slot: int, offset: int) -> None:
    slab = SlabAllocator().slab(slot_bytes, num_slots)
    assert (slab.slot_bytes, slab.num_slots, slab.num_bytes) == (slot_bytes, num_slots, slot_bytes * num_slots)
    assert slab.device == "cpu"
    if slot >= num_slots:
        with pytest.raises(ConfigError, match=f"slot {slot} of a slab of {num_slots}"):
            slab.slot(slot)
        return
    start = slab.slot(slot)
    room = slab.num_bytes - slot * slot_bytes
    if offset > room:
        with pytest.raises(ConfigError, match="left in the slab"):
            start.at(offset)
        return
    place = start.at(offset)
    assert (place.slot, place.offset_bytes, place.buffer_offset) == (slot, offset, slot * slot_bytes + offset)
    place.numpy(room - offset)[:] = 7
    content = place.buffer.numpy()[: slab.num_bytes]
    assert not content[: place.buffer_offset].any()
    assert (content[place.buffer_offset :] == 7).all()
    with pytest.raises(ConfigError, match="left in the slab"):
        place.numpy(room - offset + 1)


def test_slabs_that_share_memory_lie_one_behind_the_other() -> None:
    first, second = SlabAllocator().slabs([(1000, 2500), (10, 100)], spare_bytes=24)
    assert (first.num_slots, second.num_slots) == (3, 10)  # the last slot of the first is cut short
    first.slot(2).numpy(500)[:] = 1
    second.slot(0).numpy(100)[:] = 2
    content = first.slot(0).buffer.numpy()
    assert len(content) == 2624
    assert content[2000:2500].tolist() == [1] * 500
    assert content[2500:2600].tolist() == [2] * 100
    assert not content[2600:].any()
    with pytest.raises(ConfigError):
        first.slot(2).numpy(501)


def test_a_slab_is_charged_until_its_last_reference_is_gone() -> None:
    allocator = SlabAllocator(Budget(3 * MIB))
    slab = allocator.slab(MIB, 2)
    assert allocator.given_bytes() == 2 * MIB
    with pytest.raises(BudgetError, match=r"of 3\.0 MiB for slabs in dram 2\.0 MiB are given out") as refused:
        allocator.slab(MIB, 2)
    assert (refused.value.needed_bytes, refused.value.available_bytes) == (4 * MIB, 3 * MIB)
    assert allocator.given_bytes() == 2 * MIB
    rows = kernels.RowBlock(slab.slot(1), 4, kernels.RowFormat.alike(512, 128, 2, 1))
    array = slab.slot(0).numpy(10)
    del slab
    gc.collect()
    assert allocator.given_bytes() == 2 * MIB
    del rows, array
    gc.collect()
    assert allocator.given_bytes() == 0
    allocator.slab(MIB, 3)


def test_another_device_is_refused_by_name() -> None:
    with pytest.raises(BudgetError, match="on cuda:0 does not fit: of 0 B for slabs in vram"):
        SlabAllocator(Budget(MIB)).slab(4096, 1, device="cuda:0")
    with pytest.raises(ConfigError, match="device 'cuda:0' can't be had"):
        SlabAllocator(Budget(0, MIB)).slab(4096, 1, device="cuda:0")


def test_rows_in_a_slab_are_those_that_were_put_there() -> None:
    slab = SlabAllocator().slab(64, 5)
    content = torch.arange(5 * 16, dtype=torch.float32).view(5, 16)
    slab.slot(0).numpy(320)[:] = content.view(torch.uint8).reshape(-1).numpy()
    slots = torch.tensor([4, 0, 2], dtype=torch.int32)
    for rows, expected in (
        (kernels.RowBlock(slab.slot(1), 4, kernels.RowFormat.alike(64, 16, 2, 1)), content[1:]),
        (kernels.RowBlock(slab.slot(1).at(128), 2, kernels.RowFormat.alike(64, 16, 2, 1)), content[3:]),
        (kernels.RowBlock(slab.slot(0), 3, kernels.RowFormat.alike(64, 16, 2, 1), slots), content[slots.long()]),
    ):
        wide = torch.empty(rows.num_rows, 16)
        kernels.widen(rows, 0, wide)
        assert torch.equal(wide, expected)
    with pytest.raises(ConfigError, match="beyond its memory of 256 bytes"):
        kernels.RowBlock(slab.slot(1), 5, kernels.RowFormat.alike(64, 16, 2, 1))
    with pytest.raises(ConfigError, match="beyond its memory"):
        kernels.RowBlock(slab.slot(1), 3, kernels.RowFormat.alike(64, 16, 2, 1), slots)
