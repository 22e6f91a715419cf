"""`PRUConfig`: what `PRUForCausalLM` is made of, as a transformers configuration."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from flashlm.errors import ConfigError
from flashlm.pru.shapes import check_positive

ARCHITECTURES = ("pru", "lstm")


class PRUConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of a recurrent language model; the defaults are the paper's PRU with g = 4, M = 1400.

    Attributes:
        vocab_size: Words, `<eos>` included.
        embedding_size: Of the word vectors; also the size of the last layer, whose output meets the tied softmax.
        hidden_size: M of every layer but the last.
        num_layers: Recurrent layers.
        groups: g of the grouped transform.
        levels: K of the pyramid.
        arch: `pru`, or `lstm` for the baseline.
        split: See `PyramidalTransform`.
        subsampling: See `PyramidalTransform`.
        residual: See `PyramidalTransform`.
        init: See `GroupedLinear`.
        dropout: On the embeddings, between layers and on the output (the authors' code: 0.4).
        use_cache: Return the recurrent state.
    """

    model_type = "pru"
    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012 - transformers' own protocol: no prediction to be gathered

    vocab_size: int = 33278
    embedding_size: int = 400
    hidden_size: int = 1400
    num_layers: int = 3
    groups: int = 4
    levels: int = 2
    arch: str = "pru"
    split: str = "code"
    subsampling: str = "average"
    residual: bool = True
    init: str = "code"
    dropout: float = 0.4
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_positive(
            vocab_size=self.vocab_size,
            embedding_size=self.embedding_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
        )
        if self.arch not in ARCHITECTURES:
            raise ConfigError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {self.arch!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be at least 0 and less than 1, got {self.dropout}")
        if not self.tie_word_embeddings:
            raise ConfigError("tie_word_embeddings must be true: the last layer is sized for the tied softmax")
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """`num_layers`, under the name that transformers' tools ask for."""
        return self.num_layers

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """Input and hidden size of each layer."""
        outputs = [self.hidden_size] * (self.num_layers - 1) + [self.embedding_size]
        return list(zip([self.embedding_size, *outputs[:-1]], outputs, strict=True))


AutoConfig.register("pru", PRUConfig)
