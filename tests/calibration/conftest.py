"""The engine's tiny packs and their text."""

from __future__ import annotations

from tests.engine.conftest import text, tiny_pack

__all__ = ["text", "tiny_pack"]
