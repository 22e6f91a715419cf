"""`flashlm generate`: ways to give a prompt, what a pack's generation_config.json may say, and what is reported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

import flashlm
from flashlm.conversion.convert import convert
from flashlm.engine.generate import _watch_prompt
from tests.cli.test_cli import TIMEOUT_S, one_line_error, pack, source  # noqa: F401  # fixtures
from tests.cli.test_cli import flashlm as flashlm_command
from tests.models import save_checkpoint

ASKED = ("w3 w4", "--max-new-tokens", 4, "--dram", "4GiB")
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture
def copy(pack, tmp_path):  # noqa: F811
    folder = tmp_path / "pack"
    shutil.copytree(pack, folder)
    return folder


def configure(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0, **settings}))


def test_the_prompt_comes_as_argument_option_file_or_pipe(pack, tmp_path):  # noqa: F811
    prompt_file = tmp_path / "prompt.txt"
    prompt_file.write_text("w3 w4")
    rest = ("--max-new-tokens", "4", "--temperature", "0", "--dram", "4GiB", "--quiet")
    given = [("w3 w4", *rest), ("--prompt", "w3 w4", *rest), ("--prompt-file", prompt_file, *rest)]
    texts = {flashlm_command("generate", pack, *arguments).stdout for arguments in given}
    command = [sys.executable, "-m", "flashlm", "generate", str(pack), *rest]
    piped = subprocess.run(command, input="w3 w4\n", capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert texts == {piped.stdout}
    assert len(piped.stdout.split()) == 4
    empty = subprocess.run(command, input="", capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert empty.returncode == 2
    assert empty.stderr == "flashlm: the prompt is empty: give it some text\n"


def test_the_seed_of_a_sampled_run_is_printed_and_repeats_it(pack):  # noqa: F811
    first = flashlm_command("generate", pack, *ASKED, "--temperature", 1.5)
    seed = first.stderr.split("seed ")[1].split(":")[0]
    again = flashlm_command("generate", pack, *ASKED, "--temperature", 1.5, "--seed", seed)
    assert first.stdout == again.stdout
    assert "seed" not in flashlm_command("generate", pack, *ASKED, "--temperature", 0).stderr


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 3},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"prompt_lookup_num_tokens": 3},
        {"stop_strings": ["w1"], "do_sample": False},
        {"stop_strings": "w"},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "paged"},
        {"max_length": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"guidance_scale": 1.5},
    ],
)
def test_a_packs_generation_config_may_say_what_transformers_allows(copy, settings):
    configure(copy, **settings)
    done = flashlm_command("generate", copy, *ASKED, "--seed", 3, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 1 <= report["stats"]["num_new_tokens"] <= 4
    assert report["stats"]["num_prompt_tokens"] == 2
    streamed = flashlm_command("generate", copy, *ASKED, "--seed", 3)
    assert streamed.stdout.split() == report["text"].split()


def test_stop_strings_end_the_text(copy):
    configure(copy)
    words = flashlm_command("generate", copy, *ASKED, "--temperature", 0).stdout.split()
    configure(copy, stop_strings=["nowhere", words[1]])
    assert flashlm_command("generate", copy, *ASKED, "--temperature", 0).stdout.split() == words[:2]


def test_beams_count_into_the_context(copy):
    configure(copy, num_beams=4)
    asked = ("generate", copy, "w3 w4", "--max-new-tokens", 4, "--dram", "4GiB", "--context")
    one_line_error(flashlm_command(*asked, 23), 2, r"in 4 beams, but context is 23 .* raise --context to 24")
    assert flashlm_command(*asked, 24).returncode == 0


def test_what_is_not_used_of_a_generation_config_is_announced(copy):
    configure(copy, num_beams=2, num_return_sequences=2, cache_implementation="offloaded")
    done = flashlm_command("generate", copy, *ASKED)
    assert done.returncode == 0, done.stderr
    assert "num_return_sequences=2: not used here" in done.stderr
    assert "cache_implementation='offloaded': the default cache is used" in done.stderr


@pytest.mark.parametrize(
    ("text", "exit_code", "pattern"),
    [
        ('{"penalty_alpha": 0.6, "top_k": 4}', 2, "asks for contrastive search, which needs code from the hub"),
        ('{"use_mtp": true}', 2, "no multi-token-prediction layers"),
        ('{"num_beams": 0}', 4, "num_beams=0: a whole number"),
        ('{"do_sample": "yes"}', 4, "do_sample='yes': true or false"),
        ('{"token_healing": true}', 2, "token_healing, which flashlm generate does not do"),
        ('{"do_sample": true, "temperature": 0.0}', 2, "temperature=0.0: above 0"),
        ('{"num_beams": "many"}', 4, "num_beams='many': a whole number"),
        ("{", 4, r"generation_config\.json can't be used"),
        ("[1]", 4, r"generation_config\.json can't be used"),
    ],
)
def test_a_generation_config_that_cannot_be_served_is_named_before_loading(copy, text, exit_code, pattern):
    (copy / "generation_config.json").write_text(text)
    done = flashlm_command("generate", copy, *ASKED)
    one_line_error(done, exit_code, pattern)
    assert "mode hybrid" not in done.stderr


def test_a_chat_template_of_a_tokenizer_with_token_types_works(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    kept = ["input_ids", "token_type_ids", "attention_mask"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"model_input_names": kept}))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    asked = ("generate", copy, *ASKED, "--temperature", 0)
    assert flashlm_command(*asked, "--chat").returncode == 0
    assert flashlm_command(*asked, "--chat").stdout == flashlm_command(*asked).stdout


def test_layers_of_a_prompt_are_counted_where_layers_stand_for_linear_ones(tmp_path):
    """OPT's streamed layers stand for fc1, which refuses hooks of others."""
    save_checkpoint(tmp_path / "source", "opt")
    convert(tmp_path / "source", tmp_path / "pack", dtype="float32")
    model = flashlm.load(tmp_path / "pack", context=32)
    told = []
    with _watch_prompt(model, lambda *what: told.append(what)):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2)
    assert told == [(1, 2, "prompt"), (2, 2, "prompt")]


@pytest.mark.parametrize(
    ("template", "pattern"),
    [("", "prompt is empty"), ("{{ 1 / 0 }}", "does not take the prompt"), ("{{ raise_exception('no') }}", "no")],
)
def test_a_template_that_fails_is_named(copy, template, pattern):
    (copy / "chat_template.jinja").write_text(template or "{# nothing #}")
    one_line_error(flashlm_command("generate", copy, *ASKED, "--chat"), 2, pattern)


def test_a_prompt_may_be_called_debug(pack):  # noqa: F811
    done = flashlm_command("generate", pack, "--prompt", "--debug", "--max-new-tokens", 2, "--dram", "4GiB")
    assert done.returncode == 0, done.stderr


def test_a_plan_that_does_not_fit_is_a_row_and_an_exit_code(source):  # noqa: F811
    done = flashlm_command("plan", source, "--dram", "8MiB")
    one_line_error(done, 3, r"Raise dram to .* or more\.$")
    assert "does not fit" in done.stdout
    report = flashlm_command("plan", source, "--dram", "8MiB", "--json")
    assert report.returncode == 3
    assert [budget["fits"] for budget in json.loads(report.stdout)["budgets"]] == [False]


def test_a_tokenizer_that_is_missing_or_of_another_model_is_named_before_loading(copy):
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["w3"] = 5000
    path.write_text(json.dumps(content))
    done = flashlm_command("generate", copy, *ASKED)
    one_line_error(done, 2, r"the prompt has token 5000, the model \d+ tokens: the pack's tokenizer is that of another")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    one_line_error(flashlm_command("generate", copy, *ASKED), 4, "has no tokenizer: none could be made of its source")
    assert "mode hybrid" not in done.stderr
