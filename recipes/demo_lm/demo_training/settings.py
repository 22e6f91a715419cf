"""What a training run is made of: one frozen record, filled by the command line and kept in every checkpoint.

The sizes fix a model of 8.5 M parameters (17 MB in bf16). Its FFN is wide (six times the hidden size) and holds more than
half of the weights, because the FFN is what flashlm streams; fewer, wider layers also lose less time between GEMMs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

MAY_CHANGE = ("steps", "decay_steps", "warmup_steps", "muon_lr", "adam_lr", "clip_norm")
"""Fields that a resumed run may set anew."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Model sizes, data, optimiser and schedule of one run."""

    vocab_size: int = 8192
    """Entries of the byte-pair tokenizer, at least 512: 256 bytes, the document mark, and merges worth having."""
    hidden_size: int = 256
    """Width of the residual stream."""
    ffn_size: int = 1536
    """Neurons per layer: the rows that flashlm streams."""
    num_layers: int = 6
    """Decoder layers."""
    num_heads: int = 4
    """Attention heads; they divide `hidden_size`."""
    context_length: int = 512
    """Learned positions, and the length of the windows trained on (half of it would save only a tenth of the time)."""
    batch_size: int = 4
    """Windows per optimiser step; a multiple of the threads."""
    steps: int = 4000
    """Optimiser steps, the decay included."""
    decay_steps: int = 1000
    """Steps in which the learning rates fall to zero, linearly."""
    warmup_steps: int = 40
    """Steps in which the learning rates rise from zero, linearly."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices inside the layers (Muon)."""
    adam_lr: float = 0.004
    """Peak learning rate of embeddings, biases and norms (AdamW)."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    seed: int = 0
    """Seeds the initial weights and the order of the data."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name not in ("seed", "warmup_steps")):
                raise ValueError(f"{field.name} is {value}; it must be positive")
        if self.vocab_size < 512:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be at least 512")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide hidden_size, {self.hidden_size}")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps + decay_steps is {self.warmup_steps + self.decay_steps}; it exceeds steps, {self.steps}"
            )

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Raise ValueError if a run with the settings `saved` cannot go on with these."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in MAY_CHANGE and saved.get(field.name) != value:
                raise ValueError(
                    f"{field.name} is {value}, but the checkpoint has {saved.get(field.name)}; "
                    "give the same value, or another --out"
                )
