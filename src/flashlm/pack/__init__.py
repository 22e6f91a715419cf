"""The on-disk format: layout, manifest, conversion, verification and description of a pack."""
