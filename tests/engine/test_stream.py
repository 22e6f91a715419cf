"""The block stream: runs of blocks hold the bytes of the file, in order, whatever is pinned and however few the slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashlm.engine.stream import BlockStream
from flashlm.errors import StorageError
from flashlm.memory.budget import Blocks, Needs, Placement
from flashlm.rows import layout as layout_module
from flashlm.rows.layout import UNGATED, LayerLayout
from flashlm.storage.reader import Reader

NEEDS = Needs(process_bytes=0, resident_bytes=0, kv_cache_bytes=0, working_bytes=0)
LAYERS = (
    LayerLayout(
        hidden_size=256, num_rows=4000, parts=UNGATED, encodings=("fp32",) * 2, block_rows=64
    ),  # 128 KiB; a part at the end
    LayerLayout(hidden_size=256, num_rows=1024, parts=UNGATED, encodings=("fp32",) * 2, block_rows=64),
    LayerLayout(
        hidden_size=60, num_rows=300, parts=UNGATED, encodings=("fp32",) * 2, block_rows=17
    ),  # rows don't join: padding
)


def placement(num_pinned: tuple[int, ...], num_slots: int) -> Placement:
    return Placement(
        dram_bytes=1 << 30,
        needs=NEEDS,
        units=tuple(
            Blocks(
                num_pinned=count,
                num_streamed=layout.num_blocks - count,
                pinned_bytes=sum(layout.read_bytes(block) for block in range(count)),
                streamed_bytes=sum(layout.read_bytes(block) for block in range(count, layout.num_blocks)),
            )
            for layout, count in zip(LAYERS, num_pinned, strict=True)
        ),
        num_slots=num_slots,
        slot_bytes=max(layout.block_stride_bytes for layout in LAYERS),
    )


RUN_BYTES = 1 << 20


@pytest.mark.parametrize("num_slots", [2, 16, 70])
@pytest.mark.parametrize("num_pinned", [(0, 0, 0), (20, 16, 3)])
@pytest.mark.parametrize("read_ahead", [True, False])
def test_runs_hold_the_files_bytes_in_order(
    tmp_path: Path, num_pinned: tuple[int, ...], num_slots: int, read_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_module, "RUN_BYTES", RUN_BYTES)
    contents = []
    for index, layout in enumerate(LAYERS):
        words = bytes((index * 89 + position * 7 + position // 4096) % 251 for position in range(layout.file_bytes))
        (tmp_path / f"{index}").write_bytes(words)
        contents.append(words)
    with Reader() as reader:
        files = [reader.open(tmp_path / f"{index}") for index in range(len(LAYERS))]
        stream = BlockStream(reader, files, LAYERS, placement(num_pinned, num_slots), read_ahead=read_ahead)
        longest = 0
        for layer in (0, 1, 2, 0, 2, 1):  # the last three out of order: a caller that jumps
            layout, next_block = LAYERS[layer], 0
            with stream.unit(layer) as runs:
                for run in runs:
                    assert run.blocks.start == next_block
                    start, last = layout.offset_of(next_block), run.blocks[-1]
                    num_bytes = layout.offset_of(last) + layout.read_bytes(last) - start
                    assert num_bytes <= max(RUN_BYTES, layout.block_stride_bytes)
                    assert run.place.numpy(num_bytes).tobytes() == contents[layer][start : start + num_bytes]
                    longest = max(longest, len(run.blocks))
                    next_block = run.blocks.stop
            assert next_block == layout.num_blocks
        stream.close()
    if num_pinned[0]:
        assert longest == LAYERS[0].run_blocks == 8
    assert LAYERS[2].run_blocks == 1


def test_a_layer_with_fewer_blocks_than_it_has_is_an_error_and_the_next_pass_is_whole(tmp_path: Path) -> None:
    for index, layout in enumerate(LAYERS):
        (tmp_path / f"{index}").write_bytes(bytes([index + 1]) * layout.file_bytes)
    with Reader() as reader:
        files = [reader.open(tmp_path / f"{index}") for index in range(len(LAYERS))]
        stream = BlockStream(reader, files, LAYERS, placement((4, 0, 0), 2))

        def blocks(layer: int) -> list[int]:
            with stream.unit(layer) as runs:
                return [block for run in runs for block in run.blocks]

        def lose_a_slot() -> None:
            with stream.unit(0) as runs:
                for run in runs:
                    if run.blocks.start == 4:
                        stream._num_consumed += 1  # as if its block had gone another way

        def take_another_layer_in_between() -> None:
            with stream.unit(0) as runs:
                assert next(runs).blocks == range(4)
                assert blocks(1) == list(range(LAYERS[1].num_blocks))
                next(runs)

        def stop_early() -> None:
            with stream.unit(0) as runs:
                next(runs)

        whole = list(range(LAYERS[0].num_blocks))
        assert blocks(0) == whole
        with pytest.raises(StorageError, match="0 gave 5 of its 63 blocks"):
            lose_a_slot()
        assert blocks(0) == whole
        with pytest.raises(StorageError, match="was broken off, and another one has begun"):
            take_another_layer_in_between()
        stop_early()
        assert blocks(0) == whole
        stream.close()
