"""What a measured system is to the hybrid benchmark, and the one that is a transformers model."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Spec = dict[str, Any]


class Runner(Protocol):
    """A loaded model that is fed token ids."""

    def forward(self, token_ids: list[int]) -> np.ndarray:
        """Append the ids to the context and return the last token's logits, float32, (vocab,)."""

    def reset(self) -> None:
        """Forget the context."""

    def facts(self) -> dict[str, Any]:
        """Return settings and versions for the record."""

    def last_telemetry(self) -> dict[str, Any]:
        """Return what the system itself recorded of the last forward, or nothing."""


class TorchRunner:
    """A transformers model and its KV cache."""

    def __init__(self, model: Any, facts: dict[str, Any]) -> None:
        self.model = model
        self.cache: Any = None
        self._facts = facts

    def forward(self, token_ids: list[int]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([token_ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        self.cache = out.past_key_values
        return out.logits[0, -1].float().numpy()

    def reset(self) -> None:
        self.cache = None

    def facts(self) -> dict[str, Any]:
        return self._facts

    def last_telemetry(self) -> dict[str, Any]:
        return {}
