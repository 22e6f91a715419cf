"""A model of the hub on this machine: the shards of its index, the small files, and nothing else.

Repositories often hold the weights two or three times (pickles, the trainer's own format, half precision, ONNX). Which
files are fetched is decided from the repository's list of files, before anything large is.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from pathlib import Path

from flashlm.errors import ConfigError, PackError
from flashlm.pack.checkpoint import INDEX_NAME, SINGLE_NAME, read_index
from flashlm.pack.small_files import CONFIG_NAME, choose
from flashlm.sizes import format_size


def wanted_files(sizes: Mapping[str, int | None], shards: list[str], *, with_code: bool) -> list[str]:
    """Return which files of a repository a conversion needs.

    Args:
        sizes: Bytes of each of its files by path; None where unknown.
        shards: The weight files, as `weight_files` names them.
        with_code: Whether its `.py` files are wanted.

    Raises:
        PackError: A shard is not there, or a tokenizer file is too large to be one.
    """
    missing = [name for name in shards if name not in sizes]
    if missing:
        raise PackError(f"the repository's {INDEX_NAME} names {missing[0]}, which the repository does not hold")
    whole = [name for name in (CONFIG_NAME, INDEX_NAME if SINGLE_NAME not in shards else "") if name in sizes]
    return sorted({*whole, *shards, *choose(sizes, shards, with_code=with_code).kept})


def weight_files(names: Mapping[str, object], read_file: Callable[[str], Path]) -> list[str]:
    """Return the weight files of a repository, by the rule of `open_checkpoint`: one file, or those of the index.

    Args:
        names: The repository's files.
        read_file: Fetches one of them.

    Raises:
        PackError: There is no safetensors, or the index is damaged.
    """
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    if INDEX_NAME in names:
        return sorted(read_index(read_file(INDEX_NAME)))
    pickles = [name for name in names if "/" not in name and name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise PackError(
            f"the repository holds its weights as pickles ({pickles[0]}), which can run code when opened and are not read:"
            " look for a copy in safetensors"
        )
    raise PackError(f"the repository has no weights: {SINGLE_NAME} or {INDEX_NAME} expected")


def download(source: str, *, with_code: bool, announce: Callable[[str], None]) -> Path:
    """Return the folder of a model of the hub, after fetching what is not there yet.

    Without a connection a copy that was fetched earlier is taken.

    Raises:
        ConfigError: The hub does not give it.
        PackError: The repository can't be converted.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        info = HfApi().model_info(source, files_metadata=True)
    except (OSError, ValueError, RuntimeError) as error:  # hub errors derive from these, as do httpx's
        try:
            return Path(snapshot_download(source, local_files_only=True))
        except (OSError, ValueError, RuntimeError):
            raise _not_given(source, error) from error
    try:
        sizes = {each.rfilename: each.size for each in info.siblings or ()}
        shards = weight_files(sizes, lambda name: Path(hf_hub_download(source, name, revision=info.sha)))
        wanted = wanted_files(sizes, shards, with_code=with_code)
        num_bytes = sum(sizes[name] or 0 for name in wanted)
        announce(
            f"fetching {len(wanted)} of {len(sizes)} files of {source}, {format_size(num_bytes)} (what is not here yet)"
        )
        patterns = [glob.escape(name) for name in wanted]
        return Path(snapshot_download(source, revision=info.sha, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_given(source, error) from error


def _not_given(source: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"source {source!r} is neither a local folder nor a model that the hub gives:"
        f" {str(error).strip().partition(chr(10))[0]}"
    )
