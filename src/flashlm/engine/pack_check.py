"""What is looked at before transformers builds a pack's model: manifest, config, small files, whose code it asks for."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashlm.engine.opened import OpenedPack
from flashlm.engine.resident import check_header
from flashlm.errors import ConfigError, FlashError, UnsupportedModelError
from flashlm.pack.files import check_resident_file, check_small_files, warn_of_changes
from flashlm.pack.manifest import FORMAT_VERSION, Manifest, check_version, read_manifest, resident_path
from flashlm.pack.pack_config import LOCAL_IMPLEMENTATIONS
from flashlm.structure.model_config import check_config


def check_pack(
    config: Any, opened: OpenedPack | None, *, is_checked: bool, format_version: object = FORMAT_VERSION
) -> tuple[Path | None, Manifest | None]:
    """Look at the pack that `config` was read from, where that is known, and at what `config` asks for.

    Args:
        config: The transformers config of the model that is about to be built.
        opened: The pack, where it has been opened: manifest and config.json are then not read again.
        is_checked: False does without checksums.
        format_version: What the config says of the pack's format.

    Returns:
        The folder and its manifest; None for both where it is not known which folder it is.

    Raises:
        PackError: The pack is damaged, of an older format, or of another model than `config`.
        StorageError: Its resident file is missing or of another size.
        ConfigError: An implementation was asked for that would be fetched.
    """
    refuse_fetched_code(config)
    name = getattr(config, "name_or_path", None)
    folder = Path(str(name))
    if not name or not folder.is_dir():  # a config made by hand, or a name on the hub: looked at once it is loaded
        check_version(format_version)
        return None, None
    if opened is not None and opened.folder == folder:
        manifest = opened.manifest
        warn_of_changes(folder, manifest, is_checked=is_checked)
    else:
        manifest = read_manifest(folder)
        check_small_files(folder, manifest, is_checked=is_checked)
    check_config(config, manifest, folder)
    check_resident_file(folder, manifest)
    if is_checked:
        check_header(resident_path(folder), manifest.resident)
    return folder, manifest


@contextmanager
def named_building_errors(pack: Path, *, has_arguments: bool) -> Iterator[None]:
    """Name the pack where transformers stumbles over what its config.json says.

    Args:
        pack: The folder.
        has_arguments: Whether the caller gave arguments of `from_pretrained`, which may be to blame as well.

    Raises:
        UnsupportedModelError: In the place of an error that began in transformers.
    """
    try:
        yield
    except (FlashError, OSError, MemoryError):
        raise
    except Exception as error:
        names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        foreign = list(itertools.dropwhile(lambda name: name.startswith("flashlm."), names))
        if has_arguments or any(name.startswith("flashlm.") for name in foreign):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModelError(f"transformers can't build the model of {pack}: {reason}") from error


def refuse_fetched_code(config: Any) -> None:
    """Refuse attention or experts implementations that transformers would fetch from the hub and run.

    Those that a program has registered itself are its own affair.

    Raises:
        ConfigError: There is one, in the config or as an argument of `from_pretrained`.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for key in ("_attn_implementation_internal", "_experts_implementation_internal"):
            value = getattr(part, key, None)
            if isinstance(value, str) and not _is_local(value):
                raise ConfigError(
                    f"{key.removeprefix('_').removesuffix('_internal')}={value!r} may fetch code and run it, and is made"
                    " for GPUs: use sdpa or eager"
                )


def _is_local(name: str) -> bool:
    if name in LOCAL_IMPLEMENTATIONS:
        return True
    from flashlm.transformers_seam import ALL_ATTENTION_FUNCTIONS

    return "/" not in name and "flash_attention" not in name and name in ALL_ATTENTION_FUNCTIONS.valid_keys()
