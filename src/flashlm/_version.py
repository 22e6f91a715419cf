"""The release, where modules can take it without importing the whole package's face."""

__version__ = "0.1.0"
