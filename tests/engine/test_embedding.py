"""Tables of embeddings on flash: rows as the checkpoint has them, whoever shares the table and wherever it lies."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flashlm
from flashlm.engine import flash_embedding
from flashlm.engine.block_check import BlockCheck
from flashlm.engine.counters import Counters
from flashlm.engine.flash_embedding import FlashEmbedding, TableRows
from flashlm.errors import ConfigError, PackError
from flashlm.pack.checkpoint import read_header
from flashlm.pack.manifest import read_manifest, resident_path, unit_path
from flashlm.rows.layout import MATRIX, LayerLayout
from flashlm.storage.reader import Reader, ReadRequest
from tests.engine.conftest import TinyPack

Make = Callable[[str, str], TinyPack]


@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.integers(0, 99), min_size=1, max_size=80),
    width=st.sampled_from([16, 17, 48, 600]),
    block_rows=st.sampled_from([16, 48, 112]),
    batch_bytes=st.sampled_from([1, 5000, 1 << 20]),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
)
def test_rows_are_those_of_the_file(
    ids: list[int], width: int, block_rows: int, batch_bytes: int, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    layout = LayerLayout(hidden_size=width, num_rows=100, parts=MATRIX, encodings=(dtype,), block_rows=block_rows)
    plain = layout.plain
    assert plain is not None
    assert plain.dtype is not None
    table = torch.randn(100, width, generator=torch.Generator().manual_seed(width)).to(plain.dtype)
    content = np.zeros(layout.file_bytes, dtype=np.uint8)
    raw = table.view(torch.uint8).numpy().reshape(100, layout.row_bytes)
    for row in range(100):
        begin = row // block_rows * layout.block_stride_bytes + row % block_rows * layout.row_stride_bytes
        content[begin : begin + layout.row_bytes] = raw[row]
    path = tmp_path_factory.mktemp("table") / "table.rows"
    path.write_bytes(content.tobytes())
    counters = Counters()
    with _Recording() as reader, patch.object(flash_embedding, "BATCH_BYTES", batch_bytes):
        file = reader.open(path, expected_bytes=layout.file_bytes)
        rows = TableRows(layout, torch.float32, reader, file, 0, BlockCheck(), counters)
        for some in (ids, ids[:3], [*ids[::2], 5, 99], ids):  # rows looked up recently come from memory
            assert torch.equal(rows.look_up(torch.tensor(some)), table[some].float())
        assert 0 < counters.bytes_read <= 4 * (layout.file_bytes + 2 * len(set(ids)) * 4096)
        before = counters.bytes_read
        rows.look_up(torch.tensor([ids[0]]))
        rows.look_up(torch.tensor([ids[0]]))
        assert counters.bytes_read <= before + 2 * 4096
    assert max(reader.sizes) <= max(batch_bytes, layout.row_bytes + 2 * 4096)


class _Recording(Reader):
    """Remembers how much was read at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def read(self, requests: Sequence[ReadRequest]) -> None:
        self.sizes.append(sum(request.num_bytes for request in requests))
        super().read(requests)


def test_a_prompt_of_all_blocks_reads_a_few_at_a_time_also_where_they_are_checked(tmp_path: Path) -> None:
    layout = LayerLayout(hidden_size=1024, num_rows=160, parts=MATRIX, encodings=("fp32",), block_rows=16)
    path = tmp_path / "table.rows"
    content = np.arange(160 * 1024, dtype=np.float32)
    content.tofile(path)
    checksums = [xxhash.xxh3_64_hexdigest(block) for block in np.split(content, 10)]
    every = BlockCheck([(path, checksums)], always=True)
    for check, ids in ((BlockCheck(), range(160)), (every, range(7, 160, 16))):
        with _Recording() as reader, patch.object(flash_embedding, "BATCH_BYTES", 3 * 16 * 4096):
            file = reader.open(path, expected_bytes=layout.file_bytes)
            rows = TableRows(layout, torch.float32, reader, file, 0, check, Counters())
            found = rows.look_up(torch.tensor(ids))
        assert torch.equal(found[:, 0], torch.tensor(ids) * 1024.0)
        assert reader.sizes == [3 * 16 * 4096] * 3 + [16 * 4096]


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.tensor([[3, 95, 7, 7, 0, 44], [1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "cohere", "xglm"])  # two tables or one; scaled ones
def test_a_table_on_flash_is_the_models(family: str, whole_pack: Make) -> None:
    made = whole_pack(family, "float32")
    pinned, streamed = flashlm.load(made.pack), flashlm.load(made.pack, pin=0)
    reference = made.reference("float32")
    tables = [model.get_input_embeddings() for model in (pinned, streamed)]
    assert [isinstance(each, FlashEmbedding) for each in tables] == [False, True]
    assert all(isinstance(each, type(reference.get_input_embeddings())) for each in tables)
    assert torch.equal(logits(pinned), logits(streamed))
    assert torch.allclose(logits(streamed), logits(reference), rtol=1e-4, atol=1e-5)
    counts = {sum(each.numel() for each in model.parameters()) for model in (pinned, streamed, reference)}
    if family != "xglm":  # positions that transformers computes
        assert len(counts) == 1
    streamed.tie_weights()  # what is tied is tied already
    assert torch.equal(logits(pinned), logits(streamed))
    assert len({name for name, _ in streamed.named_parameters()} ^ {name for name, _ in pinned.named_parameters()}) == 0


def test_a_table_takes_no_memory_below_the_budget_and_is_pinned_last(whole_pack: Make) -> None:
    pack = whole_pack("llama", "float32").pack
    manifest = read_manifest(pack)
    (table,) = manifest.tables
    assert f"{table.module}.weight" not in read_header(resident_path(pack))
    everything_else = sum(entry.layout.file_bytes for entry in manifest.dense)
    without = flashlm.load(pack, pin=everything_else).flash.placement
    assert (without.ring_bytes, without.tables[0].pinned_bytes) == (0, 0)
    with_table = flashlm.load(pack, pin=everything_else + table.layout.file_bytes).flash.placement
    assert with_table.tables[0].pinned_bytes == table.layout.file_bytes
    assert with_table.needs.resident_bytes == without.needs.resident_bytes == manifest.resident.num_bytes


def test_what_can_not_be_looked_up_is_refused_by_name(whole_pack: Make) -> None:
    model = flashlm.load(whole_pack("llama", "float32").pack, pin=0)
    table = model.get_input_embeddings()
    with pytest.raises(IndexError, match="token id 96 is not in a table of 96"):
        table(torch.tensor([3, 96]))
    with pytest.raises(IndexError, match="token id -1 "):
        table(torch.tensor([-1]))
    with pytest.raises(ConfigError, match="int64 or int32"):
        table(torch.tensor([0.5]))
    assert table(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 48)
    assert torch.equal(table(torch.tensor([[5]], dtype=torch.int32)), table(torch.tensor([[5]])))
    with pytest.raises(ConfigError, match="weight is streamed and can't be used"):
        table.weight[3]
    with pytest.raises(ConfigError, match="can't be replaced"):
        table.weight = nn.Parameter(torch.zeros(96, 48))
    with pytest.raises(ConfigError, match="streamed"):
        model.resize_token_embeddings(100)


def test_a_damaged_table_is_noticed(whole_pack: Make, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(whole_pack("llama", "float32").pack, tmp_path / "pack"))
    (table,) = read_manifest(pack).tables
    path = unit_path(pack, table)
    content = bytearray(path.read_bytes())
    content[table.layout.offset_of(table.layout.num_blocks - 1)] ^= 1
    path.write_bytes(content)
    last = torch.tensor([[table.num_rows - 1]])
    with pytest.raises(PackError, match=path.name):
        flashlm.load(pack)  # pins it
    if table.layout.num_blocks > 1:
        flashlm.load(pack, pin=0)
    with pytest.raises(PackError, match=path.name), torch.no_grad():
        flashlm.load(pack, pin=0, check="all")(input_ids=last)
