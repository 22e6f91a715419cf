"""A model of the hub on this machine: the shards of its index, the small files, and nothing else.

Repositories often hold the weights two or three times (pickles, the trainer's own format, half precision, ONNX). Which
files are fetched is decided from the repository's list of files, before anything large is.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from pathlib import Path

from flashlm.conversion.small_files import CONFIG_NAME, SmallFiles, choose
from flashlm.conversion.sources.gguf_header import SUFFIX, files_of, models_among
from flashlm.conversion.sources.safetensors import INDEX_NAME, SINGLE_NAME, shards_of
from flashlm.errors import ConfigError, FlashError, PackError
from flashlm.sizes import format_size


def wanted_files(
    sizes: Mapping[str, int | None], shards: list[str], *, with_code: bool
) -> tuple[list[str], SmallFiles]:
    """Return which files of a repository a conversion needs, and what of the small ones is left where it is.

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
    small = choose(sizes, shards, with_code=with_code)
    return sorted({*whole, *shards, *small.kept}), small


def weight_files(names: Mapping[str, object], read_file: Callable[[str], Path]) -> list[str]:
    """Return the weight files of a repository, by the rule of `open_checkpoint`: one file, or those of the index.

    Args:
        names: The repository's files.
        read_file: Fetches one of them.

    Raises:
        PackError: There is neither safetensors nor GGUF, or the index is damaged.
        ConfigError: There are several GGUF models.
    """
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    if INDEX_NAME in names:
        return shards_of(read_file(INDEX_NAME))
    models = models_among(names)
    if len(models) > 1:
        raise ConfigError(
            f"the repository holds {len(models)} GGUF models, name one as REPOSITORY:FILE: {', '.join(models)}"
        )
    if models:
        return files_of(models[0])
    pickles = [name for name in names if "/" not in name and name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise PackError(
            f"the repository holds its weights as pickles ({pickles[0]}), which can run code when opened and are not read:"
            " look for a copy in safetensors"
        )
    raise PackError(f"the repository has no weights: {SINGLE_NAME}, {INDEX_NAME} or a {SUFFIX} file expected")


def named_files(names: Mapping[str, object], file: str) -> list[str]:
    """Return the files of a repository that make up the GGUF model `file`: itself, or all parts of a split one.

    Raises:
        ConfigError: It is none, or the repository lacks one of them.
    """
    wanted = files_of(file)
    missing = [name for name in wanted if name not in names or not name.endswith(SUFFIX)]
    if missing:
        held = ", ".join(models_among(names)) or "none"
        raise ConfigError(f"the repository holds no {missing[0]}; its GGUF models are: {held}")
    return wanted


def download(source: str, file: str | None = None, *, with_code: bool, announce: Callable[[str], None]) -> Path:
    """Return the folder of a model of the hub, or its GGUF file, after fetching what is not there yet.

    Without a connection a copy that was fetched earlier is taken.

    Args:
        source: The repository.
        file: The GGUF file that is meant; None: the only one, or safetensors.
        with_code: Whether its `.py` files are wanted.
        announce: Called with a line about what is fetched, and with one for each thing that is not.

    Raises:
        ConfigError: The hub does not give it.
        PackError: The repository can't be converted.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    # Every `Exception`: a missing connection is an error of whichever HTTP client the hub's library was built on.
    try:
        info = HfApi().model_info(source, files_metadata=True)
    except Exception as error:
        try:
            folder = Path(hf_hub_download(source, file or CONFIG_NAME, local_files_only=True))
        except Exception:
            raise _not_given(source, error) from error
        folder = folder if file else folder.parent
        announce(f"the hub does not answer: what was fetched of {source} earlier is taken, in {folder}")
        return folder
    try:
        sizes = {each.rfilename: each.size for each in info.siblings or ()}
        if file is None:
            shards = weight_files(sizes, lambda name: Path(hf_hub_download(source, name)))
        else:
            shards = named_files(sizes, file)
        is_gguf = shards[0].endswith(SUFFIX)
        wanted, small = (shards, SmallFiles.none()) if is_gguf else wanted_files(sizes, shards, with_code=with_code)
        num_bytes = sum(sizes[name] or 0 for name in wanted)
        announce(
            f"fetching {len(wanted)} of {len(sizes)} files of {source}, {format_size(num_bytes)} (what is not here yet)"
        )
        for line in small.lines():
            announce(line)
        folder = Path(snapshot_download(source, allow_patterns=[glob.escape(name) for name in wanted]))
    except FlashError:
        raise
    except Exception as error:
        raise _not_given(source, error) from error
    if info.sha is not None and folder.name != info.sha:
        raise ConfigError(f"{source} changed on the hub while it was fetched: try again")
    return folder / shards[0] if is_gguf else folder


def _not_given(source: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"source {source!r} is neither a local folder nor a model that the hub gives:"
        f" {str(error).strip().partition(chr(10))[0]}"
    )
