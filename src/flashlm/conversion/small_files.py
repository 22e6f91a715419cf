"""What of a model's repository a pack keeps beside the weights: everything that is small and can do no harm.

Nobody can list what transformers, or a program of tomorrow, reads of a model folder: chat templates have a folder of their
own, tokenizers bring files by many names. So everything is kept but weights in other formats, pickles, code (unless it was
asked for), links that lead elsewhere, and what is too large or too much. What is left out is told, file by file.

The same rule chooses from a folder on disk and from the list of files that the hub gives.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flashlm.conversion.sources.safetensors import INDEX_NAME, SINGLE_NAME
from flashlm.errors import PackError
from flashlm.pack.files import is_tokenizer
from flashlm.pack.manifest import FLASH_DIR

CONFIG_NAME = "config.json"  # is written anew and not copied
MAX_TOKENIZER_BYTES = 256 << 20
MAX_FILE_BYTES = 32 << 20  # of whatever is no tokenizer
MAX_TOTAL_BYTES = 512 << 20
MAX_FILES = 1000
MAX_SEEN_FILES = 100_000
MAX_DEPTH = 4
_SHOWN = 3

_WEIGHTS = (
    ".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".hdf5", ".msgpack", ".tflite", ".ot", ".npz", ".npy",
    ".mlpackage", ".mlmodel", ".mlmodelc", ".llamafile", ".engine", ".plan", ".pte", ".weights", ".index.json",
    ".keras", ".pb", ".pdmodel", ".pdiparams", ".caffemodel",
)  # fmt: skip
_PICKLES = (
    ".bin", ".pt", ".pth", ".ptl", ".torchscript", ".jit", ".t7", ".ckpt", ".distcp", ".pkl", ".pickle", ".pckl", ".pk",
    ".p", ".dill", ".cloudpickle", ".joblib", ".sav", ".mar", ".nemo", ".pdparams", ".pdopt", ".rds", ".rdata",
)  # fmt: skip
_SHARED_OBJECTS = (".so", ".dll", ".dylib", ".pyd")
_CODE = (
    ".py", ".pyw", ".pyc", ".pyo", ".pyz", ".pyx", ".exe", ".msi", ".sh", ".bash", ".zsh", ".fish", ".bat", ".cmd", ".ps1",
    ".psm1", ".vbs", ".js", ".mjs", ".cjs", ".ts", ".wasm", ".ipynb", ".class", ".node", ".ko", ".o", ".a", ".pl", ".rb",
    ".php", ".lua", ".jl", ".command", ".appimage", ".desktop", ".lnk", ".ptx", ".cubin", ".hsaco",
)  # fmt: skip
_PORTUGUESE = re.compile(r"\.pt\.(md|model)$")  # README.pt.md is a text, not weights under another name
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".whl", ".jar")
_ADAPTER = re.compile(r"^adapter_config\.json$")  # transformers would look for the adapter's weights
_NAME = re.compile(r"^[^\x00-\x1f\x7f\\/]{1,200}$")


@dataclass(frozen=True, kw_only=True)
class SmallFiles:
    """What is kept and what is not.

    Attributes:
        kept: Paths within the folder, with `/`.
        left_out: Reason by path, of all other files but the weights that are converted.
    """

    kept: tuple[str, ...]
    left_out: dict[str, str]

    @classmethod
    def none(cls) -> SmallFiles:
        """Return that there are none."""
        return cls(kept=(), left_out={})

    def lines(self) -> list[str]:
        """Return what was left out as one line for each reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        return [f"left out, {reason}: {_shown(names)}" for reason, names in sorted(by_reason.items())]


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def choose(sizes: Mapping[str, int | None], weights: Iterable[str], *, with_code: bool) -> SmallFiles:
    """Choose from files by their paths (with `/`) and sizes.

    Args:
        sizes: Bytes by path; None where the size is unknown.
        weights: Those that are converted.
        with_code: Whether `.py` files are kept.

    Raises:
        PackError: A tokenizer file is too large to be one.
    """
    ignored = {*weights, CONFIG_NAME, INDEX_NAME, SINGLE_NAME}
    kept: list[str] = []
    left_out: dict[str, str] = {}
    total = 0
    for name in sorted(sizes, key=_priority):
        if name in ignored or any(part.startswith(".") for part in name.split("/")):
            continue
        num_bytes = sizes[name] or 0
        reason = reason_against(name, with_code=with_code)
        if reason is None and is_tokenizer(name):
            if num_bytes > MAX_TOKENIZER_BYTES:
                raise PackError(f"{name} is larger than {MAX_TOKENIZER_BYTES} bytes: not a tokenizer or config file")
        elif reason is None and num_bytes > MAX_FILE_BYTES:
            reason = f"larger than {MAX_FILE_BYTES >> 20} MiB"
        if reason is None and (len(kept) == MAX_FILES or total + num_bytes > MAX_TOTAL_BYTES):
            reason = f"more than {MAX_FILES} files or {MAX_TOTAL_BYTES >> 20} MiB"
        if reason is None:
            kept.append(name)
            total += num_bytes
        else:
            left_out[name] = reason
    return SmallFiles(kept=tuple(sorted(kept)), left_out=dict(sorted(left_out.items())))


def _priority(name: str) -> tuple[bool, int, str]:
    """Order by what is needed most, so that limits cut off the rest."""
    return (not is_tokenizer(name), name.count("/"), name)


def reason_against(name: str, *, with_code: bool) -> str | None:
    """Return why a file is not kept whatever its size; None where nothing speaks against it by its name."""
    path = PurePosixPath(name.lower().rstrip(" ."))  # which some systems take off
    suffixes = {*path.suffixes} - ({".pt"} if _PORTUGUESE.search(path.name) else set())
    if not all(_NAME.match(part) and part not in (".", "..") for part in name.split("/")) or len(name) > 255:
        return "a name that not every system can keep"
    if name.count("/") > MAX_DEPTH or name.split("/")[0] == FLASH_DIR:
        return "in a folder of a pack's own, or too deep"
    # A library is loaded and a pickle opened by any of its suffixes: lib.so.1, weights.pkl.txt.
    is_code = path.suffix in _CODE or not suffixes.isdisjoint(_SHARED_OBJECTS)
    if is_code and not (with_code and path.suffix == ".py" and suffixes.isdisjoint(_SHARED_OBJECTS)):
        return "code (.py is copied with --trust-remote-code)"
    if path.name.endswith(_WEIGHTS) or _ADAPTER.match(path.name):
        return "weights or what goes with them"
    if not suffixes.isdisjoint(_PICKLES):
        return "pickles, which can run code"
    if path.name.endswith(_ARCHIVES):
        return "archives"
    return None


def choose_from_folder(folder: Path, weights: Iterable[Path], *, with_code: bool) -> SmallFiles:
    """Choose from a model folder on disk; only regular files are looked at, and links only where they stay inside.

    In the hub's cache files are links into its own store, which counts as inside.

    Raises:
        PackError: As `choose`, or the folder can't be read.
    """
    sizes: dict[str, int | None] = {}
    odd: dict[str, str] = {}
    inside = [folder.resolve()]
    if folder.parent.name == "snapshots":
        inside.append(folder.parent.parent.resolve() / "blobs")
    try:
        for name, path in _walk(folder, "", 0):
            reason, num_bytes = _look(path, inside)
            if reason is None:
                sizes[name] = num_bytes
            else:
                odd[name] = reason
            if len(sizes) + len(odd) > MAX_SEEN_FILES:
                raise PackError(f"{folder} holds more than {MAX_SEEN_FILES} files: not a model folder")
    except OSError as error:
        raise PackError(f"{error.filename or folder} can't be read: {error.strerror}") from error
    found = choose(sizes, [path.name for path in weights], with_code=with_code)
    needless = {CONFIG_NAME, INDEX_NAME, SINGLE_NAME, *(path.name for path in weights)}
    odd = {name: reason for name, reason in odd.items() if name not in needless}
    return SmallFiles(kept=found.kept, left_out=dict(sorted((found.left_out | odd).items())))


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[tuple[str, Path]]:
    """Yield files, and folders that are not entered, by their path within the folder."""
    for entry in sorted(os.scandir(folder), key=lambda each: each.name):
        name = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False) and depth <= MAX_DEPTH:
            yield from _walk(Path(entry.path), f"{name}/", depth + 1)
        else:
            yield name, Path(entry.path)


def _look(path: Path, inside: list[Path]) -> tuple[str | None, int]:
    """Return why a path is not to be opened, and its size; opens nothing."""
    try:
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in inside):
            return "links that lead out of the folder", 0
        found = path.stat()
    except (OSError, RuntimeError):  # a link to nowhere, or to itself
        return "links that lead nowhere", 0
    if stat.S_ISDIR(found.st_mode):
        return "links to folders, or folders too deep", 0
    if not stat.S_ISREG(found.st_mode):
        return "no regular files", 0
    return None, found.st_size
