"""A KV cache that a broken-off pass has half written is refused; a copy from before goes on as if nothing had been."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flashlm
from flashlm.errors import ConfigError, StorageError
from flashlm.pack.manifest import unit_path
from tests.engine.conftest import TinyPack


def test_a_half_written_cache_is_refused(tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> None:
    pack = shutil.copytree(tiny_pack("llama", "float32").pack, tmp_path / "pack")
    model = flashlm.load(pack, pin=0, mode="naive")
    ids = torch.arange(3, 9)[None]
    path = unit_path(pack, model.flash.manifest.ffns[1])
    content = path.read_bytes()
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        wanted = model(ids[:, 4:5], past_key_values=copy.deepcopy(cache), use_cache=True)
        before = copy.deepcopy(cache)
        with path.open("r+b") as file:
            file.truncate(4096)
        with pytest.raises(StorageError, match="the file ended"):
            model(ids[:, 4:5], past_key_values=cache, use_cache=True)
        path.write_bytes(content)
        assert cache.get_seq_length(0) == 5  # of layer 1 too: attention comes before the layer whose read failed
        for _ in range(2):
            with pytest.raises(ConfigError, match="left half written by a forward pass that was broken off"):
                model(ids[:, 4:5], past_key_values=cache, use_cache=True)
        got = model(ids[:, 4:5], past_key_values=before, use_cache=True)
        assert torch.equal(got.logits, wanted.logits)
        model(ids[:, 5:6], past_key_values=got.past_key_values, use_cache=True)
