"""What a conversion reads: checkpoints in safetensors, plain or quantised, and GGUF files."""
