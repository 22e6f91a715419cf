"""The source of a conversion: a local model folder, a GGUF file or a hub id, opened, and the config that its pack gets."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from flashlm.conversion.hub import download
from flashlm.conversion.names import NameMap, map_names
from flashlm.conversion.small_files import SmallFiles, choose_from_folder
from flashlm.conversion.sources.gguf import gguf_checkpoint, map_gguf_names, write_model_folder
from flashlm.conversion.sources.gguf_header import SUFFIX, GgufHeader, files_of, models_among, read_gguf_header
from flashlm.conversion.sources.quantised import check_scaled, join_scales
from flashlm.conversion.sources.safetensors import INDEX_NAME, SINGLE_NAME, Checkpoint, open_checkpoint
from flashlm.errors import ConfigError
from flashlm.pack.manifest import CONFIG_NAME, FORMAT_VERSION
from flashlm.pack.pack_config import QUANT_METHOD, without_code
from flashlm.structure.experts import ExpertLayer
from flashlm.structure.model_config import load_config, read_config


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that can be converted; nothing of its weights is read yet.

    Attributes:
        name: As it was given.
        folder: Holds config.json and the small files.
        checkpoint: Its weight files and what is in them.
        config: The model's config.
        small: Which small files a pack keeps.
        header: Of a GGUF file; None of safetensors.
        notes: A line for each thing that can't be had.
    """

    name: str
    folder: Path
    checkpoint: Checkpoint
    config: PreTrainedConfig
    small: SmallFiles
    header: GgufHeader | None = None
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """Element type of a pack where none is asked for: a GGUF file's weights are exact against fp32 activations."""
        return "bfloat16" if self.header is None else "float32"

    def map_names(self, model: PreTrainedModel, layers: Sequence[ExpertLayer]) -> NameMap:
        """Return where every weight of `model` is; raises like `map_names` and `map_gguf_names`."""
        if self.header is not None:
            return map_gguf_names(model, self.header, self.checkpoint, layers)
        return map_names(model, self.checkpoint, layers, is_text_part=type(model.config) is not type(self.config))

    def pack_config(self, dtype: str) -> str:
        """Return the text of the pack's `config.json`: the source's, with the pack's dtype and our quantization entry."""
        content = without_code(_with_dtype(read_config(self.folder), dtype))
        content["dtype"] = dtype
        content["quantization_config"] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def fingerprint(self, settings: dict[str, object]) -> str:
        """Return what identifies a conversion: names, sizes and times of all source files, and its settings."""
        files = list(self.checkpoint.files)
        if self.header is None:  # what is made of a header is as old as this run
            files += [self.folder / name for name in (CONFIG_NAME, *self.small.kept)]
        found = {path.relative_to(self.checkpoint.folder).as_posix(): path.stat() for path in files}
        stats = {name: [each.st_size, each.st_mtime_ns] for name, each in found.items()}
        text = json.dumps({"files": stats, "settings": settings}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def resolve_source(
    source: str | Path, *, trust_remote_code: bool = False, announce: Callable[[str], None] | None = None
) -> Path:
    """Return the folder or GGUF file of `source`: itself where it is one, else the hub's, downloaded if need be.

    Raises:
        ConfigError: Neither a folder, a GGUF file, nor a hub id that can be reached; or a folder with several models.
        PackError: A model of the hub that has neither safetensors nor GGUF.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path.resolve())
    if path.is_file() and path.suffix == SUFFIX:
        return path.resolve()
    repository, _, file = str(source).partition(":")
    is_local = path.exists() or path.is_absolute() or str(source).startswith((".", "~"))
    if is_local or repository.count("/") > 1 or (not file and path.suffix == SUFFIX):
        raise ConfigError(f"source {str(source)!r} is not a folder, nor a {SUFFIX} file")
    return download(repository, file or None, with_code=trust_remote_code, announce=announce or (lambda line: None))


def find_gguf(source: str | Path) -> Path | None:
    """Return the GGUF file on this machine that a source is; None where it is something else.

    Raises:
        ConfigError: A folder with several models.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = _of_folder(path.resolve())
    return path if path.suffix == SUFFIX and path.is_file() else None


def _of_folder(folder: Path) -> Path:
    """Return a folder with safetensors as it is, else the one GGUF model in it."""
    if any((folder / name).exists() for name in (SINGLE_NAME, INDEX_NAME)):
        return folder
    names = sorted(path.name for path in folder.iterdir())
    # Of a split model any part stands for all: where the first is missing, another tells so.
    models = models_among(names) or [name for name in names if len(files_of(name)) > 1][:1]
    if len(models) > 1:
        raise ConfigError(f"{folder} holds {len(models)} GGUF models, name one of them: {', '.join(models)}")
    return folder / models[0] if models else folder


@contextmanager
def open_source(name: str, path: Path, *, trust_remote_code: bool = False) -> Iterator[Source]:
    """Open what `resolve_source` found: reads headers and config, no weights.

    Raises:
        PackError: The source is damaged or incomplete.
        UnsupportedModelError: A model that can't be converted.
    """
    if path.is_dir():
        yield _open_folder(name, path, trust_remote_code)
        return
    header = read_gguf_header(path)
    with tempfile.TemporaryDirectory(prefix="flashlm-gguf-") as made:
        folder = Path(made)
        notes = write_model_folder(header, folder)
        yield Source(
            name=name,
            folder=folder,
            checkpoint=gguf_checkpoint(header),
            config=load_config(folder),
            small=choose_from_folder(folder, (), with_code=False),
            header=header,
            notes=notes,
        )


def _open_folder(name: str, folder: Path, trust_remote_code: bool) -> Source:
    config = load_config(folder, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder)
    quantised = read_config(folder).get("quantization_config")
    if quantised is not None:
        checkpoint = join_scales(checkpoint, quantised)
    check_scaled(checkpoint.tensors.values())
    small = choose_from_folder(folder, checkpoint.files, with_code=trust_remote_code)
    return Source(name=name, folder=folder, checkpoint=checkpoint, config=config, small=small)


def _with_dtype(content: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config in which every dtype, that of nested configs too, is `dtype`."""
    changed: dict[str, Any] = {}
    for key, value in content.items():
        if key in ("dtype", "torch_dtype"):
            changed["dtype"] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed
