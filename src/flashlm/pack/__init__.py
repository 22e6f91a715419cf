"""The on-disk format: manifest, description, checks and the order of rows."""
