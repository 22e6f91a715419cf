"""`PRUForCausalLM`: embedding, recurrent layers, tied softmax (paper §4), as a transformers model.

The recurrent state takes the place of a key-value cache: `state` goes in and comes out, one (h, c) per layer, and a
token costs the same however long the text before it. `arch="lstm"` puts `torch.nn.LSTM` in the layers' place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from flashlm.errors import ConfigError
from flashlm.pru.cell import State
from flashlm.pru.config import PRUConfig
from flashlm.pru.module import PRU
from flashlm.pru.products import Linear
from flashlm.pru.shapes import Init, Split, Subsampling
from flashlm.transformers_seam import is_initialised

EMBEDDING_RANGE = 0.1


@dataclass
class RecurrentLMOutput(ModelOutput):  # type: ignore[misc]
    """What a forward pass gives.

    Attributes:
        loss: Mean cross-entropy in nats over the predicted tokens, where there were labels.
        logits: (B, T, vocab_size).
        state: (h, c) of each layer, each (1, B, layer's size); None with `use_cache=False`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    state: tuple[State, ...] | None = None


class PRUForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A recurrent language model with `generate`, `save_pretrained` and `from_pretrained`.

    Args:
        config: Sizes and architecture.

    Raises:
        ConfigError: A size does not fit the pyramid or the groups.
    """

    config_class = PRUConfig
    config: PRUConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"decoder.weight": "embedding.weight"}  # noqa: RUF012 - transformers' own protocol
    _is_stateful = True

    def __init__(self, config: PRUConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(_layer(config, *sizes) for sizes in config.layer_sizes)
        self.decoder: nn.Linear = Linear(config.embedding_size, config.vocab_size)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is the cache

    def get_input_embeddings(self) -> nn.Module:
        """Return the word vectors."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word vectors."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the tied softmax."""
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the softmax."""
        self.decoder = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        state: tuple[State, ...] | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> RecurrentLMOutput | tuple[Any, ...]:
        """Run over tokens.

        Args:
            input_ids: int64 (B, T).
            attention_mask: Must have no zeros: padding would enter the state.
            state: Of the text before; None: zeros.
            labels: int64 (B, T), shifted here; -100 is not counted.
            use_cache: Return the state; None: as the configuration says.
            logits_to_keep: Only so many positions from the end; 0: all.
            return_dict: Return a tuple where False.

        Raises:
            ConfigError: The batch is padded, or the state is of another model.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ConfigError(
                "attention_mask has zeros: a recurrent state can't skip padding; batch texts of equal length"
            )
        if state is not None and len(state) != len(self.layers):
            raise ConfigError(f"state must have one (h, c) for each of {len(self.layers)} layers, got {len(state)}")
        x = self._drop(self.embedding(input_ids).transpose(0, 1))
        after: list[State] = []
        for position, layer in enumerate(self.layers):
            x, last = layer(x, None if state is None else state[position])
            x = self._drop(x)
            after.append(last)
        logits = self.decoder(x.transpose(0, 1)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ConfigError("labels need the logits of all tokens: leave logits_to_keep at 0")
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        keeps_state = self.config.use_cache if use_cache is None else use_cache
        output = RecurrentLMOutput(loss=loss, logits=logits, state=tuple(after) if keeps_state else None)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, state: tuple[State, ...] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Feed the prompt first, then one token at a time with the state."""
        if state is None:
            return {
                "input_ids": input_ids,
                "attention_mask": kwargs.get("attention_mask"),
                "use_cache": kwargs.get("use_cache"),
                "logits_to_keep": 1,
            }
        return {"input_ids": input_ids[:, -1:], "state": state, "use_cache": True, "logits_to_keep": 1}

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def _init_weights(self, module: nn.Module) -> None:
        if any(is_initialised(parameter) for parameter in module.parameters(recurse=False)):
            return  # loaded from a checkpoint
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.uniform_(module.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        # The layers initialise themselves when they are made.


def _layer(config: PRUConfig, input_size: int, hidden_size: int) -> nn.Module:
    if config.arch == "lstm":
        return nn.LSTM(input_size, hidden_size)
    return PRU(
        input_size,
        hidden_size,
        groups=config.groups,
        levels=config.levels,
        split=cast(Split, config.split),
        subsampling=cast(Subsampling, config.subsampling),
        residual=config.residual,
        init=cast(Init, config.init),
    )


AutoModelForCausalLM.register(PRUConfig, PRUForCausalLM)
