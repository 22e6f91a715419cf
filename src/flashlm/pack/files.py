"""Whether a pack's files are there, are files, and are as long as the manifest says; the small ones are read and checked.

Of the weights no content is read here: that is checked while it is loaded, or by `verify`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

import xxhash

from flashlm.errors import PackError, StorageError
from flashlm.pack.manifest import CONFIG_NAME, Manifest, layer_path, resident_path
from flashlm.pack.pack_config import NOTE_NAME, read_pack_config
from flashlm.storage.outside import check_regular, read_document

logger = logging.getLogger(__name__)

MAX_SMALL_FILE_BYTES = 256 << 20
_READ_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py", "")  # that are read whole

_TOKENIZER_SUFFIXES = (".model", ".tiktoken", ".jinja")
_TOKENIZER_NAMES = frozenset(
    {
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
        "added_tokens.json", "vocab.txt", "merges.txt", "chat_template.json", "preprocessor_config.json",
        "processor_config.json", "tekken.json",
    }
)  # fmt: skip


def check_files(pack: Path, manifest: Manifest) -> None:
    """Compare the sizes of all weight files with the manifest.

    Raises:
        StorageError: A file is missing, can't be looked at, or is of another size.
        PackError: In the place of a file is something else: a pipe, a device, a folder.
    """
    check_resident_file(pack, manifest)
    for entry, layout in manifest.files:
        _check_size(layer_path(pack, entry), layout.file_bytes)


def check_resident_file(pack: Path, manifest: Manifest) -> None:
    """Compare the size of the resident file with the manifest; raises like `check_files`."""
    _check_size(resident_path(pack), manifest.resident.num_bytes)


def check_small_files(pack: Path, manifest: Manifest, *, is_checked: bool = True) -> None:
    """Look at everything in the folder that transformers may open, before it does.

    A changed config.json is refused, since it changes what the model computes. Tokenizer and generation settings are a
    user's own to change: that is announced.

    Args:
        pack: The folder.
        manifest: Its manifest.
        is_checked: False does without checksums.

    Raises:
        PackError: What should be a file is a pipe or a device, or is too large; or config.json is damaged or changed.
    """
    read_pack_config(pack, manifest, is_checked=is_checked)
    check_special_files(pack)
    if is_checked:
        for problem in small_file_problems(pack, manifest, but=(CONFIG_NAME, NOTE_NAME)):
            logger.warning("%s; if that was not you, convert the model again", problem)


def check_special_files(folder: Path, *, only: Callable[[str], bool] = bool) -> None:
    """Refuse a model folder in which something that transformers may open is no file, or has no end.

    Args:
        folder: The model folder.
        only: Which names are looked at; all, unless given.

    Raises:
        PackError: There is a pipe, a device, a socket, a link to nowhere, or a small file that is none.
    """
    problem = next(iter(special_file_problems(folder, only=only)), None)
    if problem is not None:
        raise PackError(problem)


def special_file_problems(folder: Path, *, only: Callable[[str], bool] = bool) -> list[str]:
    """Return one line for each thing in the folder itself that is neither a folder nor a file of a fair size."""
    try:
        paths = sorted(path for path in folder.iterdir() if only(path.name) and not path.is_dir())
    except OSError as error:
        return [f"{folder} can't be read: {error.strerror}"]
    problems = []
    for path in paths:
        try:
            num_bytes = check_regular(path)
        except FileNotFoundError:  # gone meanwhile
            continue
        except PackError as error:
            problems.append(str(error))
            continue
        if num_bytes > MAX_SMALL_FILE_BYTES and path.suffix in _READ_SUFFIXES:
            problems.append(f"{path} is larger than the {MAX_SMALL_FILE_BYTES} bytes that such a file may have")
    return problems


def small_file_problems(pack: Path, manifest: Manifest, *, but: Collection[str] = ()) -> list[str]:
    """Return one line for each small file (`but` some) that is missing, can't be read, or is not as it was converted."""
    problems = []
    for name, checksum in sorted({CONFIG_NAME: "", **manifest.small_files}.items()):
        if name in but:
            continue
        path = pack / name
        try:
            found = xxhash.xxh3_64_hexdigest(read_document(path, MAX_SMALL_FILE_BYTES))
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except PackError as error:
            problems.append(str(error))
        else:
            if found != checksum:
                problems.append(f"{path} is not as it was converted: checksum {found}, {checksum or 'none'} expected")
    return problems


def _check_size(path: Path, wanted_bytes: int) -> None:
    try:
        got_bytes = check_regular(path)
    except OSError as error:
        raise StorageError(
            f"{path} can't be opened: {os.strerror(error.errno or 0)}: the pack is incomplete, convert again",
            path=str(path),
            errno=error.errno,
        ) from error
    if got_bytes != wanted_bytes:
        raise StorageError(
            f"{path} has {got_bytes} bytes, {wanted_bytes} expected: it is truncated or from another pack;"
            " convert again",
            path=str(path),
            wanted_bytes=wanted_bytes,
            got_bytes=got_bytes,
        )


def is_tokenizer(name: str) -> bool:
    """Return whether a file in the folder itself is one that generating text may need."""
    return "/" not in name and (name in _TOKENIZER_NAMES or name.endswith(_TOKENIZER_SUFFIXES))
