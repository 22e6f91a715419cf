"""What passes and generations allocate, as arithmetic: more of anything never needs less, and refusals say what to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm.errors import BudgetError
from flashlm.memory.generation_memory import GenerationShape, generation_items
from flashlm.memory.pass_memory import (
    PASS_SLACK_BYTES,
    PassFacts,
    PassShape,
    check_pass,
    most_that_fits,
    pass_items,
    working_bytes,
)

SMALL = st.integers(1, 64)
FACTS = st.builds(
    PassFacts,
    hidden_size=SMALL,
    vocab_size=SMALL,
    num_layers=SMALL,
    num_heads=SMALL,
    dtype_bytes=st.sampled_from([2, 4]),
    kv_token_bytes=SMALL.map(lambda size: 64 * size),
    scratch_bytes=SMALL,
    token_bytes=SMALL,
    writes_scores=st.booleans(),
    masks=st.booleans(),
    logit_copies=st.sampled_from([1, 2]),
)
FLAGS = ("is_masked", "has_hidden_states", "has_attentions", "has_loss")
PASSES = st.fixed_dictionaries(
    dict.fromkeys(("num_sequences", "num_tokens", "width", "num_cached", "num_kept", "row_bytes"), SMALL)
    | {name: st.booleans() for name in FLAGS}
)
COUNTS = (
    "num_sequences",
    "num_past",
    "num_prompt",
    "num_new",
    "num_kept_logits",
    "num_drafted",
    "draft_bytes",
    "row_bytes",
)
GENERATION_FLAGS = ("keeps_hidden_states", "makes_hidden_states", "makes_attentions", "keeps_attentions")
GENERATIONS = st.fixed_dictionaries(
    dict.fromkeys(COUNTS, SMALL) | {name: st.booleans() for name in (*GENERATION_FLAGS, "has_second_cache")}
)


def _more(values: dict[str, int | bool], name: str) -> dict[str, int | bool]:
    return values | {name: True if isinstance(values[name], bool) else values[name] + 1}


@given(FACTS, PASSES)
def test_more_of_anything_never_needs_less(facts, values):
    needed = sum(pass_items(facts, PassShape(**values)).values())
    for name in values:
        assert sum(pass_items(facts, PassShape(**_more(values, name))).values()) >= needed, name


@given(FACTS, GENERATIONS)
def test_more_of_anything_never_needs_less_in_a_generation(facts, values):
    needed = sum(generation_items(facts, GenerationShape(**values)).values())
    for name in values:
        assert sum(generation_items(facts, GenerationShape(**_more(values, name))).values()) >= needed, name


@given(FACTS, SMALL, SMALL)
def test_what_loading_reserves_covers_every_greedy_prompt_within_context(facts, context, num_tokens):
    num_tokens = min(num_tokens, context)
    shape = PassShape(num_sequences=1, num_tokens=num_tokens, width=num_tokens, num_cached=0)
    reserved = working_bytes(facts, context)
    if not facts.writes_scores:  # where it does, generate cuts the prompt
        assert sum(pass_items(facts, shape).values()) <= reserved


def test_a_cache_of_a_fixed_size_counts_whole():
    facts = PassFacts(
        hidden_size=8,
        vocab_size=10,
        num_layers=2,
        num_heads=2,
        dtype_bytes=2,
        kv_token_bytes=100,
        scratch_bytes=0,
        token_bytes=0,
    )
    shape = PassShape(num_sequences=3, num_tokens=1, width=400000, num_cached=400000, capacity=400000)
    assert pass_items(facts, shape)["capacity of the cache"] == 3 * 400000 * 100


def test_a_refusal_names_the_largest_item_its_remedy_and_the_bytes():
    with pytest.raises(BudgetError, match=r"(?s)this pass needs .* MiB logits.*logits_to_keep=N.*labels=") as refused:
        check_pass({"logits": 1 << 28, "KV cache": 1 << 20}, 1 << 27, "this pass")
    assert refused.value.needed_bytes == (1 << 28) + (1 << 20) + PASS_SLACK_BYTES
    assert refused.value.available_bytes == 1 << 27
    check_pass({"logits": 1 << 20}, (1 << 20) + PASS_SLACK_BYTES, "this pass")


@given(st.integers(0, 200), st.integers(0, 200))
def test_most_that_fits_is_the_largest_that_does(limit, most):
    assert most_that_fits(lambda count: count <= limit, most) == min(limit, most)
