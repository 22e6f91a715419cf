"""A source checkpoint in safetensors: one file, or shards with an index. Pickles (`pytorch_model.bin`) are refused."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flashlm.documents import read_json
from flashlm.errors import PackError
from flashlm.pack.checkpoint import TensorEntry, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All tensors of a checkpoint folder by name, and the weight files they lie in."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]

    @property
    def place(self) -> Path:
        """What a message names: the file where there is one, else the folder."""
        return self.files[0] if len(self.files) == 1 else self.folder


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the index and the headers of the safetensors files in `folder`; no weights are read.

    Raises:
        PackError: No safetensors, a missing shard, a damaged header or index, or an element type that can't be read.
    """
    if os.path.lexists(folder / SINGLE_NAME):  # something else than a file is refused when it is opened
        return _checkpoint(folder, {SINGLE_NAME: None})
    if os.path.lexists(folder / INDEX_NAME):
        return _checkpoint(folder, _read_index(folder / INDEX_NAME))
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise PackError(
            f"{folder} holds its weights as pickles (.bin), which can run code when opened and are not read:"
            " save the model again as safetensors, with model.save_pretrained(FOLDER)"
        )
    raise PackError(f"{folder} has no weights: {SINGLE_NAME} or {INDEX_NAME} expected")


def _checkpoint(folder: Path, wanted: dict[str, set[str] | None]) -> Checkpoint:
    tensors: dict[str, TensorEntry] = {}
    for file, names in wanted.items():
        found = read_header(folder / file)
        missing = sorted((names or set()) - set(found))
        if missing:
            raise PackError(f"{folder / file} lacks {len(missing)} tensors that {INDEX_NAME} lists, first {missing[0]}")
        for name, entry in found.items():
            if names is None or name in names:
                tensors[name] = entry
    return Checkpoint(folder=folder, files=tuple(folder / file for file in sorted(wanted)), tensors=tensors)


def _read_index(path: Path) -> dict[str, set[str] | None]:
    content = read_json(path, MAX_INDEX_BYTES)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise PackError(f"{path} has no weight_map")
    names: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise PackError(f"{path} names {file!r} for {name}, which is not a safetensors file in this folder")
        found = names.setdefault(file, set())
        assert found is not None
        found.add(name)
    return names


def shards_of(index: Path) -> list[str]:
    """Return the names of the weight files that an index names.

    Raises:
        PackError: It is damaged, or names a file that could not lie beside it.
    """
    return sorted(_read_index(index))
