"""The language model as transformers sees it: sizes, state, generation, saving."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flashlm.errors import ConfigError
from flashlm.pru import PRUConfig, PRUForCausalLM

SMALL = {"vocab_size": 50, "embedding_size": 16, "hidden_size": 24, "num_layers": 3, "groups": 2}


@pytest.fixture(params=["pru", "lstm"])
def model(request: pytest.FixtureRequest) -> PRUForCausalLM:
    torch.manual_seed(0)
    return PRUForCausalLM(PRUConfig(**SMALL, arch=request.param, init="per_group")).eval()


@pytest.mark.parametrize(
    ("arch", "hidden", "groups", "penn", "wikitext"),
    [
        ("lstm", 1000, 1, 19_869_200, 29_203_678),
        ("lstm", 1150, 1, 24_221_600, 33_556_078),
        ("lstm", 1200, 1, 25_792_400, 35_126_878),
        ("lstm", 1400, 1, 32_675_600, 42_010_078),
        ("pru", 1000, 1, 18_969_200, 28_303_678),
        ("pru", 1200, 2, 18_512_400, 27_846_878),
        ("pru", 1400, 4, 18_895_600, 28_230_078),
    ],
)
def test_models_have_the_published_number_of_parameters(
    arch: str, hidden: int, groups: int, penn: int, wikitext: int
) -> None:
    counts = []
    for vocab_size in (10_000, 33_278):
        config = PRUConfig(vocab_size=vocab_size, hidden_size=hidden, groups=groups, arch=arch)
        with torch.device("meta"):
            model = PRUForCausalLM(config)
        model.tie_weights()
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    assert counts == [penn, wikitext]


def test_state_carries_the_text_before(model: PRUForCausalLM) -> None:
    tokens = torch.randint(0, 50, (2, 12))
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :7])
        second = model(tokens[:, 7:], state=first.state).logits
    torch.testing.assert_close(torch.cat([first.logits, second], dim=1), whole, rtol=0, atol=1e-5)


def test_generate_equals_greedy_search_without_state(model: PRUForCausalLM) -> None:
    tokens = torch.randint(1, 50, (2, 5))
    made = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_generate_whatever_dtype_is_default(
    model: PRUForCausalLM, dtype: torch.dtype, default_dtype: Callable[[torch.dtype], AbstractContextManager[None]]
) -> None:
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = torch.tensor([[4, 5, 6]])
    expected = model.generate(tokens, **asked)
    with default_dtype(dtype):
        assert torch.equal(model.generate(tokens, **asked), expected)
        made = PRUForCausalLM(model.config).eval()
        assert made.dtype == dtype
        assert made.generate(tokens, **asked).shape == expected.shape


def test_generate_samples_a_batch_and_several_sequences_of_it(model: PRUForCausalLM) -> None:
    tokens = torch.randint(1, 50, (3, 4))
    options = {"max_new_tokens": 5, "do_sample": True, "top_k": 20, "pad_token_id": 0, "num_return_sequences": 2}
    torch.manual_seed(1)
    made = model.generate(tokens, **options)
    torch.manual_seed(1)
    assert torch.equal(made, model.generate(tokens, **options))
    assert torch.equal(made[:, :4], tokens.repeat_interleave(2, dim=0))
    assert made.shape == (6, 9)


def test_saved_model_is_the_same_and_stays_tied(model: PRUForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, PRUForCausalLM)
    assert again.config.to_dict()["arch"] == model.config.arch
    assert again.decoder.weight is again.embedding.weight
    tokens = torch.randint(0, 50, (2, 6))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_loss_is_the_mean_over_predicted_tokens_and_reaches_every_parameter(model: PRUForCausalLM) -> None:
    tokens = torch.randint(0, 50, (2, 6))
    output = model(tokens, labels=tokens)
    log_probabilities = output.logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])
    torch.testing.assert_close(output.loss, -log_probabilities.mean())
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_wrong_configurations_and_states_are_refused(model: PRUForCausalLM) -> None:
    tokens = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ConfigError, match="state must have one"):
        model(tokens, state=())
    with pytest.raises(ConfigError, match=r"for 2 sequences, got \[\[\(1, 1, 24\)"):
        model(tokens, state=model(tokens[:1]).state)
    with pytest.raises(ConfigError, match="arch must be one of"):
        PRUConfig(**SMALL, arch="gru")
