"""Perplexity: token-exact, and the papers' count beside it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flashlm.errors import ConfigError
from flashlm.pru import PRUConfig, PRUForCausalLM
from flashlm.pru.training.evaluate import score

IDS = np.random.default_rng(0).integers(0, 30, 101)


@pytest.fixture
def model() -> PRUForCausalLM:
    torch.manual_seed(0)
    return PRUForCausalLM(PRUConfig(vocab_size=30, embedding_size=8, hidden_size=16, groups=2, init="per_group"))


def test_batch_one_scores_every_token_but_the_first(model: PRUForCausalLM) -> None:
    result = score(model, IDS, window=7)
    text = torch.from_numpy(IDS)
    with torch.no_grad():
        logits = model.eval()(text[None]).logits[0]
    expected = F.cross_entropy(logits[:-1], text[1:], reduction="sum").item()
    assert result.num_tokens == 100
    assert result.loss_sum == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected / 100), rel=1e-6)


def test_the_published_count_divides_by_the_columns_length(model: PRUForCausalLM) -> None:
    result = score(model, IDS, batch_size=10)
    assert result.num_tokens == 10 * 9  # 101 tokens: columns of 10, one token dropped
    assert result.published_perplexity == pytest.approx(math.exp(result.loss_sum / 100), rel=1e-9)
    assert result.published_perplexity < result.perplexity


def test_the_window_changes_nothing_and_the_mode_is_left_alone(model: PRUForCausalLM) -> None:
    model.train()
    whole = score(model, IDS, window=1000).loss
    assert score(model, IDS, window=3).loss == pytest.approx(whole, rel=1e-6)
    assert model.training


def test_a_text_of_one_token_is_refused(model: PRUForCausalLM) -> None:
    with pytest.raises(ConfigError, match="1 tokens are too few"):
        score(model, IDS[:1])
