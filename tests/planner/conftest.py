"""The engine's tiny packs, for plans too."""

from tests.engine.conftest import tiny_pack

__all__ = ["tiny_pack"]
