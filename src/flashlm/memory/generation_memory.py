"""What a whole `generate` allocates at its peak: its prompt, or its last step with all that it keeps until then.

Pure arithmetic, over `pass_memory`.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashlm.memory.pass_memory import (
    ASSISTANT,
    GREEDY_LOGIT_BYTES,
    KEPT,
    OTHER_CACHES,
    PassFacts,
    PassShape,
    pass_items,
)

KEPT_LOGIT_BYTES = 4  # fp32


@dataclass(frozen=True, kw_only=True)
class GenerationShape:
    """A generation, before its first token.

    Attributes:
        num_sequences: Rows of every pass: the batch, times beams or returned sequences.
        num_past: Tokens of a sequence that a given cache holds.
        num_prompt: Tokens of a sequence that are new to the cache.
        num_new: Tokens to generate at most.
        fixed_width, fixed_tokens: Positions, and tokens in the mean over the layers, of a cache of a fixed size; 0 else.
        prefill_tokens: Tokens of the prompt that a pass takes; None takes all.
        has_cache: Whether keys and values are kept between steps.
        row_bytes: What choosing a token costs for each entry of the vocabulary, beside the logits.
        is_masked: Whether the prompts are padded.
        num_kept_logits: Kinds of logits kept of every step: scores and raw ones.
        keeps_hidden_states, keeps_attentions: Whether every step's are kept; `makes_` whether a pass makes them at all.
        num_drafted: Tokens that an assistant or a look-up proposes at once.
        draft_bytes: Memory of the assistant's cache and logits.
        has_second_cache: Whether every pass is made a second time with a cache of its own (guidance).
    """

    num_sequences: int
    num_past: int
    num_prompt: int
    num_new: int
    fixed_width: int = 0
    fixed_tokens: int = 0
    prefill_tokens: int | None = None
    has_cache: bool = True
    row_bytes: int = GREEDY_LOGIT_BYTES
    is_masked: bool = False
    num_kept_logits: int = 0
    keeps_hidden_states: bool = False
    keeps_attentions: bool = False
    makes_hidden_states: bool = False
    makes_attentions: bool = False
    num_drafted: int = 0
    draft_bytes: int = 0
    has_second_cache: bool = False

    @property
    def num_total(self) -> int:
        """Tokens of a sequence that pass through the model: the last new one does not."""
        return self.num_past + self.num_prompt + self.num_new - 1


def generation_items(facts: PassFacts, shape: GenerationShape) -> dict[str, int]:
    """Return what a generation holds at its peak, in bytes by item; slack is not in it."""
    piece = min(shape.prefill_tokens or shape.num_prompt, shape.num_prompt)
    prompt_end = shape.num_past + shape.num_prompt
    prefill = _pass(facts, shape, piece, prompt_end, 1)
    step_tokens = 1 + shape.num_drafted if shape.has_cache else shape.num_total
    last = _pass(facts, shape, step_tokens, shape.num_total, 1 + shape.num_drafted)
    last[KEPT] = _kept_bytes(facts, shape)
    if shape.has_second_cache:
        last[OTHER_CACHES] = shape.num_sequences * shape.num_total * facts.kv_token_bytes
    last[ASSISTANT] = prefill[ASSISTANT] = shape.draft_bytes
    return max(prefill, last, key=lambda items: sum(items.values()))


def _pass(facts: PassFacts, shape: GenerationShape, num_tokens: int, end: int, num_kept: int) -> dict[str, int]:
    return pass_items(
        facts,
        PassShape(
            num_sequences=shape.num_sequences,
            num_tokens=num_tokens,
            width=max(end, shape.fixed_width),
            num_cached=(shape.fixed_tokens or end) if shape.has_cache else 0,
            capacity=shape.fixed_tokens,
            num_kept=num_kept,
            is_masked=shape.is_masked,
            has_hidden_states=shape.makes_hidden_states,
            has_attentions=shape.makes_attentions,
            row_bytes=shape.row_bytes,
        ),
    )


def _kept_bytes(facts: PassFacts, shape: GenerationShape) -> int:
    """Return the memory of what is handed back for every step."""
    rows = shape.num_sequences
    num_bytes = shape.num_new * rows * facts.vocab_size * KEPT_LOGIT_BYTES * shape.num_kept_logits
    if shape.keeps_hidden_states:
        num_bytes += (facts.num_layers + 1) * rows * shape.num_total * facts.hidden_size * facts.dtype_bytes
    if shape.keeps_attentions and facts.writes_scores:
        width = max(shape.num_total, shape.fixed_width)
        num_bytes += facts.num_layers * facts.num_heads * rows * shape.num_total * width * facts.dtype_bytes
    return num_bytes
