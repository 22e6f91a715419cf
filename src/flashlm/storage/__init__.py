"""The device: direct reads of file ranges into aligned memory."""
