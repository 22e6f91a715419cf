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
from flashlm.pru.grouped import GroupedLinear
from flashlm.pru.lm_arguments import causal_loss, kept_positions, refuse_unserved, token_mask
from flashlm.pru.module import PRU
from flashlm.pru.products import Linear
from flashlm.pru.pyramid import PyramidalTransform
from flashlm.pru.recurrence import run_dense
from flashlm.pru.shapes import Init, Split, Subsampling
from flashlm.transformers_seam import is_initialised, keep_from_initialising, name_causal_class

EMBEDDING_RANGE = 0.1


@dataclass
class RecurrentLMOutput(ModelOutput):  # type: ignore[misc]
    """What a forward pass gives.

    Attributes:
        loss: Mean cross-entropy in nats over the predicted tokens, where there were labels.
        logits: (B, T, vocab_size).
        state: (h, c) of each layer, each (1, B, layer's size); None with `use_cache=False`.
        hidden_states: Embeddings and each layer's output, each (B, T, its size), where asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    state: tuple[State, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


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
    accepts_loss_kwargs = True  # transformers' Trainer gives num_items_in_batch, which `forward` honours

    def __init__(self, config: PRUConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(_layer(config, *sizes) for sizes in config.layer_sizes)
        self.decoder: nn.Linear = Linear(config.embedding_size, config.vocab_size)
        for module in self.layers.modules():  # they have initialised themselves, unless made on the meta device
            if not any(parameter.is_meta for parameter in module.parameters()):
                keep_from_initialising(module)
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
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: tuple[State, ...] | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> RecurrentLMOutput | tuple[Any, ...]:
        """Run over tokens.

        Args:
            input_ids: int64 (B, T), the tokens after those that `state` has seen.
            attention_mask: (B, T) of ones and zeros; the state passes unchanged over zeros, so padding may be on either
                side. With a state it may cover the text before too: its last T columns count then.
            state: Of the text before; None: zeros.
            labels: int64 (B, T), shifted here; -100 is not counted.
            use_cache: Return the state; None: as the configuration says.
            output_hidden_states: Return the embeddings and each layer's output; None: as the configuration says.
            logits_to_keep: Only so many positions from the end, or those with these indices; 0: all.
            num_items_in_batch: Divides the summed loss instead of the number of labels here (gradient accumulation).
            return_dict: Return a tuple where False; None: as the configuration says.
            **others: Refused by name unless None or False.

        Raises:
            ConfigError: An argument is unknown or does not fit, the state is of another model or batch, or there are
                labels but none to predict.
        """
        refuse_unserved(others)
        if input_ids is None or input_ids.dim() != 2:
            got = "none" if input_ids is None else tuple(input_ids.shape)
            raise ConfigError(f"input_ids must be (batch, tokens), got {got}: this model takes token ids only")
        self._check_state(state, len(input_ids))
        mask = token_mask(attention_mask, input_ids, state is not None)
        x = self._drop(self.embedding(input_ids).transpose(0, 1))
        shows_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        after: list[State] = []
        hidden = [x.transpose(0, 1)] if shows_hidden else []
        for position, layer in enumerate(self.layers):
            x, last = _run_layer(layer, x, None if state is None else state[position], mask)
            x = self._drop(x)
            after.append(last)
            if shows_hidden:
                hidden.append(x.transpose(0, 1))
        logits = self.decoder(x.transpose(0, 1)[:, kept_positions(logits_to_keep)])
        loss = None if labels is None else causal_loss(logits, labels, input_ids.shape, num_items_in_batch)
        keeps_state = self.config.use_cache if use_cache is None else use_cache
        output = RecurrentLMOutput(
            loss=loss,
            logits=logits,
            state=tuple(after) if keeps_state else None,
            hidden_states=tuple(hidden) or None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as any transformers model does, from the start or from a state.

        With `state=` the ids are the tokens that follow what the state has seen, all of which are fed. What `generate`
        returns with `return_dict_in_generate=True` as `past_key_values` is such a state; it has not seen the last token
        of `sequences`, which therefore comes first in the next call's ids.

        Raises:
            ConfigError: `past_key_values` is given, or this model is to assist another's decoding.
        """
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        if getattr(config, "is_assistant", False):
            raise ConfigError(
                f"{type(self).__name__} can't be an assistant_model: transformers takes rejected tokens back from the"
                " assistant's cache, and a recurrent state can't forget them"
            )
        refuse_unserved({name: kwargs.get(name) for name in ("past_key_values", "inputs_embeds")})
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        state: tuple[State, ...] | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Feed all ids first; then the last `next_sequence_length`, which the state has not seen."""
        if next_sequence_length is not None:  # transformers counts one new token a step where there is a cache
            input_ids = input_ids[:, -next_sequence_length:]
            attention_mask = None  # what is generated is no padding
        return {"input_ids": input_ids, "attention_mask": attention_mask, "state": state, **kwargs}

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Repeat the state with the ids where several sequences are asked for of each; transformers repeats tensors only."""
        input_ids, state = kwargs.get("input_ids"), kwargs.get("state")
        if state is not None and expand_size > 1:
            if input_ids is not None:  # before: a state of another batch is told with the caller's own numbers
                self._check_state(state, len(input_ids))
            kwargs["state"] = tuple((_repeated(h, expand_size), _repeated(c, expand_size)) for h, c in state)
        return cast(
            tuple[Any, dict[str, Any]], super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Carry the state over to the next step, which transformers does itself before 5.24 only.

        Without a cache every step begins where the first did, with all new tokens.
        """
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        carried = {"state": outputs.state} if model_kwargs.get("use_cache") else {}
        return cast(dict[str, Any], updated) | carried

    def _check_state(self, state: tuple[State, ...] | None, batch: int) -> None:
        if state is None:
            return
        expected = [(1, batch, size) for _, size in self.config.layer_sizes]
        try:
            found = [[tuple(part.shape) for part in layer] for layer in state]
        except (AttributeError, TypeError):
            found = []
        if found != [[shape, shape] for shape in expected]:
            raise ConfigError(
                f"state must have one (h, c) for each of {len(expected)} layers, of shapes {expected} for {batch}"
                f" sequences, got {found or type(state).__name__}"
            )

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def initialize_weights(self) -> None:
        """Initialise what neither a constructor nor a checkpoint has."""
        # not in _init_weights: transformers passes modules by whose parameters are all in lists, as the pyramid's are
        for module in self.layers.modules():
            if isinstance(module, PyramidalTransform | GroupedLinear | nn.LSTM) and not is_initialised(module):
                _reset_missing(module)
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.uniform_(module.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def _repeated(part: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat each sequence of (1, B, size) in place, as transformers repeats ids."""
    return part.repeat_interleave(times, dim=1)


def _reset_missing(module: PyramidalTransform | GroupedLinear | nn.LSTM) -> None:
    """Initialise the parameters that no checkpoint gave."""
    parameters = list(module.parameters())
    loaded = [(each, each.detach().clone()) for each in parameters if is_initialised(each)]
    if len(loaded) == len(parameters):
        return
    module.reset_parameters()
    with torch.no_grad():
        for parameter, value in loaded:
            parameter.copy_(value)


def _run_layer(
    layer: nn.Module, x: torch.Tensor, state: State | None, mask: torch.Tensor | None
) -> tuple[torch.Tensor, State]:
    """Run a layer over (T, B, size); the mask (T, B) is False where there is no token."""
    if mask is None:
        y, last = layer(x, state)
        return y, last
    if isinstance(layer, PRU):
        return layer.forward_masked(x, state, mask)
    assert isinstance(layer, nn.LSTM)
    zeros = x.new_zeros(x.shape[1], layer.hidden_size)
    h0, c0 = (zeros, zeros) if state is None else (state[0][0], state[1][0])
    y, h, c = run_dense(x, list(layer.all_weights[0]), h0, c0, mask)  # torch's loop takes no mask
    return y.to(x.dtype), (h.to(h0.dtype).unsqueeze(0), c.to(c0.dtype).unsqueeze(0))


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
# By this table Trainer knows that labels are to be shifted when it smooths them itself.
name_causal_class("pru", PRUForCausalLM)
