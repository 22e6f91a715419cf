"""Random weights in quantity: checkpoints and GGUF files of any shape, written tensor by tensor.

Billions of normals take minutes to draw, so every tensor is cut from one pool of random values at an offset of its own
(and wraps where it is longer than the pool). The weights differ per tensor and are the same in every run; nothing can
be learned from what such a model *says*, only from how fast it says it and whether two programs agree.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from shapes import stored_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# With embeddings no larger than other weights, what attention adds drowns them: all tokens look alike to a router, and a
# mixture sends them to the same experts. Scaled, a token is itself in every layer, and routing is close to uniform.
MIXTURE_EMBEDDING_SCALE = 64
EMBEDDINGS = ("model.embed_tokens.weight", "token_embd.weight")
POOL_VALUES = 32 * 1024 * 1024 - 59  # odd: a wrapped tensor's rows do not repeat each other
STD = 0.02
SHARD_BYTES = 2_000_000_000
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class RandomPool:
    """One block of normal values (std 0.02) from which tensors of any size are cut."""

    def __init__(
        self, dtype: torch.dtype, *, embedding_scale: int = 1, num_values: int = POOL_VALUES, seed: int = 0
    ) -> None:
        values = np.random.default_rng(seed).standard_normal(num_values, dtype=np.float32) * STD
        # through bfloat16 in every dtype, so that files of different dtypes hold the same numbers
        self._embedding_scale = embedding_scale
        self.values = torch.from_numpy(values).to(torch.bfloat16).to(dtype)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the weights of the tensor `name`: random, but ones for the weight of a normalisation."""
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, dtype=self.values.dtype)
        count = math.prod(shape)
        start = zlib.crc32(name.encode()) % len(self.values)
        parts = []
        while count > 0:
            part = self.values[start : start + count]
            parts.append(part)
            count -= len(part)
            start = 0
        joined = torch.cat(parts).reshape(shape)
        return joined.mul_(self._embedding_scale) if name in EMBEDDINGS else joined


def embedding_scale(config: PretrainedConfig) -> int:
    """Return by how much the embeddings of a config are larger than its other weights."""
    is_mixture = any(hasattr(config, name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    return MIXTURE_EMBEDDING_SCALE if is_mixture else 1


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the tensor's memory as an array of bytes (no copy)."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def split_into_shards(sizes: dict[str, int], limit_bytes: int) -> list[list[str]]:
    """Return tensor names in shards of about `limit_bytes`, in order."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], pool: RandomPool) -> int:
    """Write one safetensors file, one tensor in memory at a time; return its bytes. Kept if it is already complete."""
    item_bytes = pool.values.element_size()
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * item_bytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[pool.values.dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    total_bytes = 8 + len(text) + end
    if path.exists() and path.stat().st_size == total_bytes:
        return total_bytes
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            as_bytes(pool.tensor(name, shape)).tofile(file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return total_bytes


def write_checkpoint(folder: Path, config: PretrainedConfig, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a sharded random checkpoint of `config` in its own dtype, return its bytes; complete shards stay."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = RandomPool(config.dtype, embedding_scale=embedding_scale(config))
    shapes = stored_shapes(config)
    sizes = {name: math.prod(shape) * pool.values.element_size() for name, shape in shapes.items()}
    shards = split_into_shards(sizes, shard_bytes)
    total_bytes = 0
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total_bytes += write_shard(folder / file, {name: shapes[name] for name in names}, pool)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config.save_pretrained(folder)
    return total_bytes
