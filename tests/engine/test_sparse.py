"""Mode sparse: with every row asked for it is hybrid, bit for bit; what the cache holds never changes an answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flashlm
from flashlm.engine.ffn import FlashFFN
from flashlm.engine.sparse import SparseRows
from flashlm.errors import ConfigError, PackError, StorageError
from flashlm.memory.neuron_cache import LayerCapacity
from flashlm.pack.manifest import read_manifest, unit_path
from flashlm.probe.device_profile import profile_path, save_profile
from flashlm.storage.reader import Reader
from tests.engine.calibrations import evaluation, write_calibration
from tests.engine.conftest import TinyPack
from tests.models import FAMILIES
from tests.planner.profiles import make_profile

DRAM = "3GiB"


@pytest.fixture
def calibrated(tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> Callable[..., Path]:
    def make(family: str, dtype: str = "float32", **settings: object) -> Path:
        pack = tmp_path / f"{family}-{dtype}"
        shutil.copytree(tiny_pack(family, dtype).pack, pack)
        write_calibration(pack, **settings)  # type: ignore[arg-type]
        return pack

    return make


def _shrink(model: torch.nn.Module, num_slots: int, **settings: object) -> SparseRows:
    """Give a loaded model a cache of `num_slots` slots a layer."""
    flash = model.flash
    manifest = flash.manifest
    layouts = [manifest.ffns[layer].layout for layer in range(len(manifest.ffns))]
    files = [flash.reader.open(unit_path(flash.pack, entry)) for entry in manifest.ffns]
    capacities = [LayerCapacity(num_rows=each.num_rows, num_slots=min(num_slots, each.num_rows)) for each in layouts]
    rows = SparseRows(flash.reader, files, layouts, capacities, counters=flash.sparse.counters, **settings)
    for module in model.modules():
        if isinstance(module, FlashFFN):
            module.use_rows(rows, module.bound.predict)
    return rows


def _tokens(model: torch.nn.Module, num_sequences: int = 1, length: int = 5) -> torch.Tensor:
    return torch.arange(3, 3 + num_sequences * length).view(num_sequences, length)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_rows_give_hybrid_to_the_bit(family: str, calibrated: Callable[..., Path]) -> None:
    pack = calibrated(family, predicts_all=True)
    sparse = flashlm.load(pack, dram=DRAM, mode="sparse", context=160)
    hybrid = flashlm.load(pack, dram=DRAM, mode="hybrid", context=160)
    tokens = _tokens(sparse)
    with torch.no_grad():
        torch.testing.assert_close(sparse(tokens).logits, hybrid(tokens).logits, rtol=0, atol=0)
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(sparse.generate(tokens, **asked), hybrid.generate(tokens, **asked))
    assert sparse.flash.sparse.counters.hit_rows > 0


@pytest.mark.parametrize("family", ["opt", "llama", "nemotron"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_changes_no_bit(family: str, dtype: str, calibrated: Callable[..., Path]) -> None:
    model = flashlm.load(calibrated(family, dtype), dram=DRAM, mode="sparse", context=160)
    asked = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    tokens = _tokens(model)
    wanted = model.generate(tokens, output_logits=True, **asked)
    for settings in ({"num_slots": 88}, {"num_slots": 40}, {"num_slots": 7}, {"num_slots": 60, "window": 2}):
        _shrink(model, **settings)
        got = model.generate(tokens, output_logits=True, **asked)
        assert torch.equal(got.sequences, wanted.sequences), settings
        assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True)), settings


def test_a_token_is_the_same_alone_and_in_a_batch(calibrated: Callable[..., Path]) -> None:
    model = flashlm.load(calibrated("opt"), dram=DRAM, mode="sparse", context=160)
    layer = next(module for module in model.modules() if isinstance(module, FlashFFN))
    tokens = torch.randn(4, layer.layout.hidden_size)
    with torch.no_grad():
        together = layer(tokens)
        alone = torch.cat([layer(token[None]) for token in tokens])
    assert torch.equal(together, alone)
    predicted = layer.bound.predict(tokens)
    assert 0.2 < predicted.float().mean() < 0.8


def test_only_predicted_rows_count(calibrated: Callable[..., Path]) -> None:
    pack = calibrated("llama", activation_threshold=0.02)
    model = flashlm.load(pack, dram=DRAM, mode="sparse", context=160)
    layer = next(module for module in model.modules() if isinstance(module, FlashFFN))
    tokens = torch.randn(3, layer.layout.hidden_size)
    with torch.no_grad():
        got = layer(tokens)
        predict = layer.bound.predict
        layer.use_rows(None, None)
        everything = layer(tokens)
        layer.selection = predict
        masked = layer(tokens)
        layer.activation_threshold = 0.0
        unthresholded = layer(tokens)
    assert torch.equal(got, masked)
    assert not torch.allclose(got, everything)
    assert not torch.equal(got, unthresholded)


@pytest.mark.parametrize("num_tokens", [9, 40])
def test_a_prompt_is_exact_whatever_the_activation_threshold(num_tokens: int, calibrated: Callable[..., Path]) -> None:
    pack = calibrated("llama", activation_threshold=0.02)
    prompt = torch.arange(3, 3 + num_tokens)[None]
    with torch.no_grad():
        got, exact = (
            flashlm.load(pack, dram=DRAM, mode=mode, context=160)(prompt).logits for mode in ("sparse", "hybrid")
        )
    assert torch.equal(got, exact)


def test_a_failed_read_leaves_no_row_behind(calibrated: Callable[..., Path]) -> None:
    pack = calibrated("opt", predicts_all=True)
    manifest = read_manifest(pack)
    layout = manifest.ffns[0].layout
    reader = Reader()
    file = reader.open(unit_path(pack, manifest.ffns[0]))
    capacity = LayerCapacity(num_rows=layout.num_rows, num_slots=20)
    rows = SparseRows(reader, [file], [layout], [capacity])
    wanted = torch.tensor([1, 2, 80], dtype=torch.int32)
    with unit_path(pack, manifest.ffns[0]).open("r+b") as damaged:
        damaged.truncate(layout.offset_of(1))
    with pytest.raises(StorageError, match="the file ended"), rows.fetch(0, wanted) as fetch:
        rows.wait(fetch)
    assert rows.cache.occupancy(0) == 0
    with rows.fetch(0, wanted[:2]) as fetch:
        assert fetch.lookup.num_held == 0
    with pytest.raises(RuntimeError), rows.fetch(0, torch.tensor([5], dtype=torch.int32)):
        raise RuntimeError
    assert rows.cache.occupancy(0) == 2
    reader.close()


def test_sparse_needs_predictors(tiny_pack: Callable[..., TinyPack]) -> None:
    with pytest.raises(ConfigError, match=r"has no predictors.*flashlm calibrate"):
        flashlm.load(tiny_pack("opt", "float32").pack, dram=DRAM, mode="sparse")


def test_predictors_of_another_checkpoint_are_refused(
    tiny_pack: Callable[..., TinyPack], calibrated: Callable[..., Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_pack("opt", "bfloat16").pack, other)
    for name in ("sparsity.json", "sparsity.safetensors"):
        shutil.copy(calibrated("opt") / "flash" / name, other / "flash" / name)
        shutil.rmtree(tmp_path / "opt-float32")
    with pytest.raises(PackError, match="other weights"):
        flashlm.load(other, dram=DRAM, mode="sparse")


def test_auto_takes_sparse_only_after_a_passed_calibration(calibrated: Callable[..., Path]) -> None:
    for has_passed, pin, wanted in ((True, 0, "sparse"), (True, None, "hybrid"), (False, 0, "hybrid")):
        pack = calibrated("opt", evaluation=evaluation(has_passed=has_passed))
        assert flashlm.load(pack, dram=DRAM, pin=pin).flash.mode == wanted  # unpinned, it does not fit
        shutil.rmtree(pack)


@pytest.mark.parametrize("family", ["opt", "llama", "phi3", "gpt2"])
def test_on_a_probed_device_the_planner_sets_the_gap(
    family: str, calibrated: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHLM_CACHE", str(tmp_path / "cache"))
    pack = calibrated(family)
    assert flashlm.load(pack, dram=DRAM, mode="sparse", context=160).flash.max_gap == 0
    slow_reads = make_profile()  # 33,000 small reads a second, whatever their size: reading through gaps pays
    save_profile(slow_reads, profile_path(pack))
    model = flashlm.load(pack, dram=DRAM, mode="sparse", context=160)
    assert model.flash.max_gap == model.flash.sparse.max_gap > 0
    profile_path(pack).write_text("{}")
    assert flashlm.load(pack, dram=DRAM, mode="sparse", context=160).flash.max_gap == 0  # a damaged profile: as without


def test_rows_finer_than_the_devices_block_are_read_through_the_page_cache(
    calibrated: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device with blocks of 4 KiB, rows of 512 bytes: a direct read of one row would be refused."""
    pack = calibrated("opt")
    wanted = flashlm.load(pack, dram=DRAM, mode="sparse", context=160)
    tokens = _tokens(wanted)
    open_file = Reader.open

    def open_coarsely(self: Reader, path: Path, *, direct: bool = True, **settings: object) -> object:
        file = open_file(self, path, direct=direct, **settings)  # type: ignore[arg-type]
        file.alignment_bytes = 4096 if direct else 1
        return file

    monkeypatch.setattr(Reader, "open", open_coarsely)
    model = flashlm.load(pack, dram=DRAM, mode="sparse", context=160)
    assert not any(file.is_direct for file in model.flash.sparse._files)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, wanted(tokens).logits)
