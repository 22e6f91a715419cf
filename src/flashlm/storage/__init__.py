"""The device: direct reads into aligned memory, files that are written whole or not at all, what systems differ in."""
