"""What a forward pass allocates, from its shape alone, item by item: activations, scores, logits, caches.

Pure arithmetic, so that loading (what must be reserved), each pass (does it fit what is left?) and `generate` (will all of
it fit?) count in the same way. Knows neither torch nor transformers. The bytes a logit or a score costs were measured with
torch's memory profiler on torch 2.13 (`docs/experiments.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flashlm.errors import BudgetError
from flashlm.sizes import format_size

# Attention written out (eager, or sdpa where keys and values differ in width): scores, their scaled or masked copy, and the
# softmax in fp32 with its input: 10.0 bytes in bf16, 8.0 in fp32, 11.8 where sdpa falls back.
SCORE_BYTES = 12
# A prompt goes through such a model in pieces of at least so many tokens where the whole would not fit.
SCORE_PIECE_TOKENS = 64
# Rows of logits that generation works on: fp32 copies; with beams their log-probabilities added up and cut; in sampling
# sorted values, indices and probabilities.
GREEDY_LOGIT_BYTES = 12
BEAM_LOGIT_BYTES = 24
SAMPLING_LOGIT_BYTES = 44
LOSS_LOGIT_BYTES = 8  # fp32 logits and their log-softmax
# Of the allocator's slack that loading reserves, what a pass leaves alone; the rest covers batches and sampling.
PASS_SLACK_BYTES = 96 << 20

ACTIVATIONS, MASK, SCORES, LOGITS, CACHE = "activations", "attention mask", "attention scores", "logits", "KV cache"
HIDDEN_STATES, ATTENTIONS, OTHER_CACHES = "hidden states of all layers", "attentions of all layers", "other live caches"
KEPT, ASSISTANT, STATIC_CACHE = "kept outputs of all steps", "the assistant model", "capacity of the cache"

_REMEDIES = {
    ACTIVATIONS: "feed fewer tokens at once",
    MASK: "feed fewer tokens at once (prefill_chunk_size in generate)",
    SCORES: "feed fewer tokens at once (prefill_chunk_size in generate), or use attn_implementation='sdpa'",
    LOGITS: "pass logits_to_keep=N for the last N positions only, or labels= for the loss alone, which is made in pieces",
    CACHE: "use fewer or shorter sequences",
    STATIC_CACHE: "make the cache shorter (max_cache_len)",
    HIDDEN_STATES: "leave output_hidden_states out, or feed fewer tokens at once",
    ATTENTIONS: "leave output_attentions out, or feed fewer tokens at once",
    OTHER_CACHES: "drop the caches (past_key_values) of earlier passes",
    KEPT: "leave output_scores, output_logits, output_hidden_states and output_attentions out, or generate fewer tokens",
    ASSISTANT: "leave assistant_model out, or generate fewer tokens",
}


@dataclass(frozen=True, kw_only=True)
class PassFacts:
    """What the memory of a model's passes depends on.

    Attributes:
        hidden_size, vocab_size, num_layers, num_heads: Of the decoder.
        dtype_bytes: Bytes of an activation.
        kv_token_bytes: What a token of one sequence adds to the KV cache, all layers together.
        scratch_bytes: Scratch of products, whatever the number of tokens.
        token_bytes: Live activations of a token.
        writes_scores: Whether attention holds the scores of all heads at once.
        masks: Whether attention needs a mask without padding too (sliding windows).
        logit_copies: Live copies of a logit (2 where a family scales or caps them).
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    dtype_bytes: int
    kv_token_bytes: int
    scratch_bytes: int
    token_bytes: int
    writes_scores: bool = False
    masks: bool = False
    logit_copies: int = 1


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """One forward pass.

    Attributes:
        num_sequences, num_tokens: Input ids, (num_sequences, num_tokens).
        width: Positions that a token may attend to: past and new ones, or the capacity of a fixed cache.
        num_cached: Tokens of a sequence that the cache has room for afterwards, mean over the layers; 0 without a cache.
        num_kept: Positions of a sequence whose logits are made.
        capacity: Of `num_cached`, what is room only: the cache is of a fixed size.
        is_masked: Whether a mask is passed that hides something.
        has_hidden_states, has_attentions: Whether all layers' are kept.
        has_loss: Whether the loss of all kept logits is made at once.
        row_bytes: What choosing a token costs for each entry of the vocabulary, beside the logits.
    """

    num_sequences: int
    num_tokens: int
    width: int
    num_cached: int
    num_kept: int = 1
    capacity: int = 0
    is_masked: bool = False
    has_hidden_states: bool = False
    has_attentions: bool = False
    has_loss: bool = False
    row_bytes: int = GREEDY_LOGIT_BYTES


def logits_bytes(facts: PassFacts, num_positions: int, *, has_loss: bool = False) -> int:
    """Return the memory of the logits of so many positions, all sequences together."""
    each = facts.dtype_bytes * facts.logit_copies + (LOSS_LOGIT_BYTES if has_loss else 0)
    return num_positions * facts.vocab_size * each


def pass_items(facts: PassFacts, shape: PassShape) -> dict[str, int]:
    """Return what a pass holds at its peak, in bytes by item; slack and other caches are not in it."""
    num_tokens = shape.num_sequences * shape.num_tokens
    num_pairs = num_tokens * shape.width
    is_masked = shape.is_masked or facts.masks or facts.writes_scores
    scores_bytes = num_pairs * facts.num_heads
    layer_kv_bytes = facts.kv_token_bytes // facts.num_layers
    # a cache that grows is copied layer by layer; one of a fixed size is there from the first pass on
    copied = shape.num_sequences * (shape.num_cached - shape.capacity) * layer_kv_bytes
    items = {
        ACTIVATIONS: facts.scratch_bytes + num_tokens * facts.token_bytes,
        MASK: num_pairs * (1 + (facts.dtype_bytes if is_masked else 0)),
        SCORES: scores_bytes * SCORE_BYTES if facts.writes_scores else 0,
        LOGITS: logits_bytes(facts, shape.num_sequences * shape.num_kept, has_loss=shape.has_loss)
        + shape.num_sequences * facts.vocab_size * shape.row_bytes,
        CACHE: shape.num_sequences * (shape.num_cached - shape.capacity) * facts.kv_token_bytes + copied,
        STATIC_CACHE: shape.num_sequences * shape.capacity * facts.kv_token_bytes,
    }
    if shape.has_hidden_states:
        items[HIDDEN_STATES] = (facts.num_layers + 1) * num_tokens * facts.hidden_size * facts.dtype_bytes
    if shape.has_attentions and facts.writes_scores:
        items[ATTENTIONS] = facts.num_layers * scores_bytes * facts.dtype_bytes
    return items


def working_bytes(facts: PassFacts, context: int) -> int:
    """Return what loading reserves for passes beside the cache and slack: a prompt of `context` tokens, greedy.

    Where attention writes its scores out, a prompt of `SCORE_PIECE_TOKENS` tokens at a time: `generate` cuts it.
    """
    shape = PassShape(num_sequences=1, num_tokens=context, width=context, num_cached=0)
    items = pass_items(facts, shape)
    if facts.writes_scores:
        items[SCORES] = facts.num_heads * min(context, SCORE_PIECE_TOKENS) * context * SCORE_BYTES
    return sum(items.values())


def check_pass(items: dict[str, int], available_bytes: int, what: str) -> None:
    """Refuse what does not fit.

    Args:
        items: Bytes by item, as `pass_items` gives them.
        available_bytes: What the budget has for them and the slack.
        what: The pass in words, for the message.

    Raises:
        BudgetError: It lists the largest items and says what to do about the largest.
    """
    needed_bytes = sum(items.values()) + PASS_SLACK_BYTES
    if needed_bytes <= available_bytes:
        return
    largest = sorted(items, key=lambda name: -items[name])[:3]
    listed = ", ".join(f"{format_size(items[name])} {name}" for name in largest if items[name])
    raise BudgetError(
        f"{what} needs {format_size(needed_bytes)} of working memory ({listed}), but the budget has"
        f" {format_size(available_bytes)} for it: {_REMEDIES[largest[0]]}; or load the model with more dram or a larger"
        " context, which reserves more",
        needed_bytes=needed_bytes,
        available_bytes=available_bytes,
    )


def most_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest count up to `most` for which `fits` holds, 0 if none: what fits is smaller than what does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
