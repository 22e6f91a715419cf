"""The engine: modules that replace transformers' own feed-forward layers, and the quantizer that swaps them in."""
