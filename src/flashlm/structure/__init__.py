"""Where a transformers model keeps what can be streamed."""
