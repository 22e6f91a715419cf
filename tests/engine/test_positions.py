"""The number of positions is a limit only where the model has a table of them; scalings make it larger."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from flashlm.conversion.convert import convert
from flashlm.engine.generate import Sampling, generate
from flashlm.engine.positions import check_positions, has_position_table, stated_positions, trained_positions
from flashlm.errors import ConfigError
from tests import tiny_models
from tests.engine.conftest import save_tokenizer
from tests.models import save_checkpoint

TABLES = ["biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt", "opt"]
COMPUTED = ["cohere", "falcon", "gemma2", "gpt_neox", "jamba", "llama", "mixtral", "persimmon", "phi", "qwen3", "xglm"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160, "rope_theta": 10000.0}


@pytest.mark.parametrize("model_type", [*TABLES, *COMPUTED])
@pytest.mark.filterwarnings("ignore")
def test_a_table_is_found_where_one_more_token_fails(model_type: str) -> None:
    """Told from the config alone; the model itself says whether that is right."""
    config = tiny_models.small_config(model_type)
    num_positions = stated_positions(config.get_text_config(decoder=True))
    assert num_positions == 160
    assert has_position_table(config, num_positions) == (model_type in TABLES)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        assert model(torch.full((1, num_positions), 3)).logits.shape[1] == num_positions
        if model_type in COMPUTED:
            assert torch.isfinite(model(torch.full((1, num_positions + 1), 3)).logits).all()
            return
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, num_positions + 1), 3))


@pytest.mark.parametrize(
    ("rope", "trained"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, 160),
        (YARN, 640),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, 320),
        ({"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0}, 480),
        ({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 80, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "rope_theta": 10000.0}, 160),
    ],
)  # fmt: skip
def test_scaling_makes_the_trained_length(rope: dict, trained: int, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_models.AutoConfig.for_model("llama", **tiny_models.SMALL, rope_parameters=rope)
    assert trained_positions(config) == trained
    with caplog.at_level(logging.WARNING, logger="flashlm"):
        check_positions(config, trained - 10, 10)
        assert not caplog.records
        check_positions(config, trained, 10)
    assert f"the model was trained for {trained}" in caplog.text


def test_generate_goes_past_the_unscaled_number_and_refuses_past_a_table(tmp_path, caplog) -> None:
    for family, settings in (("llama", {"max_position_embeddings": 32, "rope_parameters": YARN | {
            "original_max_position_embeddings": 32}}), ("opt", {"max_position_embeddings": 32})):  # fmt: skip
        save_checkpoint(tmp_path / family, family, **settings)
        save_tokenizer(tmp_path / family)
        convert(tmp_path / family, tmp_path / f"{family}-pack")
    prompt = " ".join(f"w{number}" for number in range(3, 43))
    sampling = Sampling(max_new_tokens=8, temperature=0)
    found = generate(tmp_path / "llama-pack", prompt, sampling=sampling)
    assert found.stats["num_prompt_tokens"] == 40
    assert "trained for" not in caplog.text
    with pytest.raises(ConfigError, match="40 tokens and 8 more are wanted, but the model has 32 positions"):
        generate(tmp_path / "opt-pack", prompt, sampling=sampling)
