"""Rows laid down in another order: the same model, whole at every moment, and checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import flashlm
from flashlm.conversion.convert import convert
from flashlm.conversion.verify import verify
from flashlm.errors import PackError
from flashlm.pack import reorder as reordering
from flashlm.pack.manifest import Manifest, layer_path, order_path, read_manifest
from flashlm.pack.reorder import read_order, remove_strays, reorder
from tests.models import save_checkpoint


@pytest.fixture(scope="module", params=["opt", "llama"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reorder")
    save_checkpoint(folder / "source", request.param)
    convert(folder / "source", folder / "pack", dtype="fp32", block_rows=16)
    return folder / "pack"


@pytest.fixture
def pack(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "pack"))


def _orders(manifest: Manifest, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.permutation(entry.num_rows) for entry in manifest.layers]


def _rows(pack: Path, manifest: Manifest, layer: int) -> np.ndarray:
    layout = manifest.layout(layer)
    raw = np.fromfile(layer_path(pack, manifest.layers[layer]), dtype=np.uint8)
    spans = [(layout.offset_of(block), len(layout.rows_of(block))) for block in range(layout.num_blocks)]
    stride = layout.row_stride_bytes
    return np.concatenate([raw[start : start + count * stride].reshape(count, stride) for start, count in spans])


def _logits(pack: Path) -> torch.Tensor:
    model = flashlm.load(pack, dram="3GiB", context=32)
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


def test_the_model_stays_the_same_twice_over(good: Path, pack: Path) -> None:
    before = read_manifest(pack)
    first = _orders(before)
    manifest = reorder(pack, before, first)
    assert read_manifest(pack) == manifest
    assert verify(pack).problems == ()
    for layer, order in enumerate(first):
        assert np.array_equal(_rows(pack, manifest, layer), _rows(good, before, layer)[order])
        assert np.array_equal(read_order(pack, manifest.layers[layer]), order)
    torch.testing.assert_close(_logits(pack), _logits(good), rtol=1e-4, atol=1e-5)
    second = _orders(manifest, seed=1)
    again = reorder(pack, manifest, second)
    assert np.array_equal(read_order(pack, again.layers[0]), first[0][second[0]])
    assert verify(pack).problems == ()
    torch.testing.assert_close(_logits(pack), _logits(good), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moment", ["rows", "order", "manifest", "unlink"])
def test_stopped_at_any_moment_the_pack_is_whole(pack: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(pack)
    wanted = _logits(pack)
    orders = _orders(manifest)
    writes = 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    write_small_file = reordering.write_small_file

    def write(path: Path, content: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == {"order": 3, "manifest": 4}.get(moment):
            stop()
        write_small_file(path, content)

    monkeypatch.setattr(reordering, "write_small_file", write)
    if moment == "rows":
        monkeypatch.setattr(reordering, "_write_rows", stop)
    if moment == "unlink":
        unlink = Path.unlink

        def stop_at_rows(path: Path, missing_ok: bool = False) -> None:
            if path.suffix == ".rows":
                stop()
            unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(Path, "unlink", stop_at_rows)
    with pytest.raises(KeyboardInterrupt):
        reorder(pack, manifest, orders)
    monkeypatch.undo()
    torch.testing.assert_close(_logits(pack), wanted, rtol=1e-4, atol=1e-5)
    left = read_manifest(pack)
    remove_strays(pack, left)
    assert verify(pack).problems == ()
    reorder(pack, left, _orders(left))
    torch.testing.assert_close(_logits(pack), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_no_permutation_is_refused(pack: Path) -> None:
    manifest = read_manifest(pack)
    orders = _orders(manifest)
    orders[1][0] = orders[1][1]
    with pytest.raises(PackError, match="no permutation"):
        reorder(pack, manifest, orders)
    with pytest.raises(PackError, match="as many orders"):
        reorder(pack, manifest, orders[:1])
    assert read_manifest(pack) == manifest


def test_a_damaged_order_is_found(pack: Path) -> None:
    manifest = reorder(pack, read_manifest(pack), _orders(read_manifest(pack)))
    path = order_path(pack, manifest.layers[0])
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert any(".order is damaged" in problem for problem in verify(pack).problems)
    with pytest.raises(PackError, match="is damaged"):
        flashlm.load(pack, dram="3GiB")
