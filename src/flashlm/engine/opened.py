"""A pack that has been opened: its manifest and its config, each read and checked once, and handed on from there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashlm.pack.manifest import Manifest, read_manifest
from flashlm.structure.model_config import load_pack_config


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedPack:
    """What was read of a pack's folder before any weight.

    Attributes:
        folder: The pack's folder.
        manifest: Its manifest.
        config: Its transformers config.
    """

    folder: Path
    manifest: Manifest
    config: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenedPack:
        """Return itself: transformers copies the config that this hangs on, and nothing here changes."""
        return self


def open_pack(pack: str | Path, *, is_checked: bool, trust_remote_code: bool = False) -> OpenedPack:
    """Read manifest and config of a pack.

    Args:
        pack: The folder.
        is_checked: Whether config.json is held against its checksum.
        trust_remote_code: Whether code that the pack brings may run.

    Raises:
        PackError: Not a finished pack, or its config.json is missing, damaged or (`is_checked`) changed.
        UnsupportedModelError: A config that this transformers can't use.
    """
    folder = Path(pack)
    manifest = read_manifest(folder)
    config = load_pack_config(folder, manifest, is_checked=is_checked, trust_remote_code=trust_remote_code)
    return OpenedPack(folder=folder, manifest=manifest, config=config)
