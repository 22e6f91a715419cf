"""The command line as a user meets it: output, exit codes, one-line errors."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flashlm.cli.app import main
from flashlm.errors import PackError
from tests.models import save_checkpoint

TIMEOUT_S = 120


@dataclass
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def flashlm(*arguments):
    """Run the command line in this process: importing torch anew for every case would take longer than the tests."""
    out, errors = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code or 0
    return Done(code, out.getvalue(), errors.getvalue())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "source"
    save_checkpoint(folder, "llama", vocab_size=96, max_position_embeddings=128)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 96)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pack(source):
    folder = source.parent / "pack"
    done = flashlm("convert", source, folder, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    return folder


def one_line_error(done, exit_code, pattern):
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(pattern, done.stderr.strip().splitlines()[-1]), done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom flashlm.cli.app import main\n"
        "try: main(['--help'])\nexcept SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'flashlm._native'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("convert", "info", "verify", "generate"):
        assert verb in done.stdout


def test_info_states_the_smallest_dram_that_works(pack):
    described = json.loads(flashlm("info", pack, "--context", 32, "--json").stdout)
    floor_bytes = described["smallest_dram_bytes"]
    at_floor = floor_bytes + (32 << 20)  # another process's libraries weigh a little more or less
    arguments = ("generate", pack, "--prompt", "w3 w4", "--max-new-tokens", 4, "--context", 32, "--dram")
    done = flashlm(*arguments, at_floor)
    assert done.returncode == 0, done.stderr
    one_line_error(flashlm(*arguments, floor_bytes // 2), 3, r"flashlm: dram=.* is below the .* that this model needs")
    plain = flashlm("info", pack)
    assert plain.returncode == 0
    assert "smallest --dram" in plain.stdout


def test_generate_is_repeatable_and_reports(pack, tmp_path):
    stats_path = tmp_path / "stats.json"
    arguments = ("generate", pack, "--prompt", "w3 w4 w5", "--max-new-tokens", 6, "--temperature", 1, "--seed", 7)
    first = flashlm(*arguments, "--stats", stats_path)
    second = flashlm(*arguments, "--json")
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    report = json.loads(second.stdout)
    assert report["text"].split() == first.stdout.split("statistics")[0].split()
    for words in ("exactness", "decode: tokens/s", "peak memory / dram"):
        assert words in first.stdout
    stats = json.loads(stats_path.read_text())
    assert stats["mode"] == "hybrid"
    assert stats["num_new_tokens"] == 6
    assert stats["decode"]["num_passes"] == 5
    assert stats["prefill"]["num_tokens"] == 3
    assert "mode hybrid (exact)" in first.stderr
    assert "\x1b[" not in first.stdout + first.stderr


def test_modes_and_budgets_give_the_same_text(pack):
    texts = set()
    for mode in ("auto", "hybrid", "naive"):
        done = flashlm("generate", pack, "--prompt", "w9", "--max-new-tokens", 8, "--temperature", 0, "--mode", mode)
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout)
    assert len(texts) == 1


def test_verify_reports_a_flipped_byte(pack, tmp_path):
    assert flashlm("verify", pack).returncode == 0
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", pack, copy], check=True)
    damaged = next((copy / "flash").glob("layer-*.rows"))
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    one_line_error(flashlm("verify", copy), 4, rf"{damaged.name}")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "pattern"),
    [
        (("generate", "PACK", "--prompt", "w3", "--dram", "lots"), 2, "'lots' is not a size"),
        (("generate", "PACK", "w3", "--prompt", "w4"), 2, "more than one prompt was given"),
        (("generate", "SOURCE", "w3"), 4, "it is a model folder. Convert it: flashlm convert .*source PACK"),
        (("generate", "PACK", "w3", "--dram", "7"), 2, "did you mean 7GiB?"),
        (("generate", "PACK", "w3", "--seed", str(1 << 64)), 2, "must fit 64 bits"),
        (("plan", "no-such-model-anywhere/at-all"), 2, "neither local nor a model whose config the hub gives"),
        (("generate", "PACK", "--prompt", ""), 2, "prompt is empty"),
        (("generate", "PACK", "--prompt", "w3", "--context", 4), 2, "context is 4"),
        (("generate", "PACK", "--prompt", "w3", "--temperature", "-1"), 2, "temperature=-1.0 must be"),
        (("generate", "PACK", "--prompt", "w3", "--chat"), 2, "no chat template"),
        (("generate", "PACK", "--prompt-file", "/nonexistent"), 2, "can't be read from /nonexistent"),
        (("generate", "/nonexistent", "--prompt", "w3"), 4, "not a finished pack"),
        (("info", "/nonexistent"), 4, "not a finished pack"),
        (("verify", "/nonexistent"), 4, "not a finished pack"),
        (("convert", "/nonexistent/model", "/tmp/never"), 2, "not a folder"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(arguments, exit_code, pattern, pack, source):
    folders = {"PACK": pack, "SOURCE": source}
    done = flashlm(*(folders.get(argument, argument) for argument in arguments))
    one_line_error(done, exit_code, pattern)


def test_debug_lets_the_error_through():
    for arguments in (("--debug", "generate", "/nonexistent", "w3"), ("generate", "/nonexistent", "w3", "--debug")):
        with pytest.raises(PackError, match="not a finished pack"):
            flashlm(*arguments)


# `python -m flashlm` where Ctrl-C works even if whoever runs the tests ignores it, as a shell's background jobs do.
MODULE_WITH_SIGINT = """if True:
    import runpy, signal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_module("flashlm", run_name="__main__", alter_sys=True)
"""


def is_importing_torch(pid):
    """Whether a process has begun to load torch; long before that Python has started and Ctrl-C is watched for."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("delay_s", [0.0, 0.3, 5.0])  # in the imports, and (where it is fast) waiting for its input
def test_interrupt_exits_130(pack, delay_s):
    command = [sys.executable, "-c", MODULE_WITH_SIGINT, "generate", str(pack), "--prompt-file", "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, stdout=pipe, text=True) as child:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not is_importing_torch(child.pid) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(delay_s)
        child.send_signal(signal.SIGINT)
        child.wait(timeout=TIMEOUT_S)
        errors = child.stderr.read()
    assert child.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == "flashlm: interrupted"


@pytest.mark.parametrize("outcome", ["raise RecursionError", "return", "sys.exit(0)", "eval('interrupt()')"])
def test_interrupt_counts_whatever_became_of_it(outcome):
    program = f"""if True:
        import builtins, os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import flashlm.__main__, flashlm.cli.app
        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                pass
        builtins.interrupt = interrupt
        def run(arguments, is_interrupted):
            try:
                interrupt()
            except KeyboardInterrupt:
                {outcome}
        flashlm.cli.app.main = run
        flashlm.__main__.main([])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr) == (130, "\nflashlm: interrupted\n")


@pytest.mark.parametrize("context", ["0", "-5"])
def test_info_refuses_a_context_below_one(pack, context):
    one_line_error(flashlm("info", pack, "--context", context), 2, "at least 1")


def test_a_prompt_that_is_not_utf8_is_refused(pack):
    one_line_error(flashlm("generate", pack, "--prompt", "caf\udcff", "--dram", "4GiB"), 2, "not UTF-8")


@pytest.mark.parametrize("verb", ["info", "generate"])
def test_a_damaged_config_is_named(pack, tmp_path, verb):
    damaged = tmp_path / "pack"
    shutil.copytree(pack, damaged)
    (damaged / "config.json").write_text("{")
    arguments = ["--prompt", "w3", "--dram", "4GiB"] if verb == "generate" else []
    one_line_error(flashlm(verb, damaged, *arguments), 4, r"config\.json is not as it was converted")


def test_a_pack_without_tokenizer_is_named(tmp_path):
    save_checkpoint(tmp_path / "source", "llama")
    assert flashlm("convert", tmp_path / "source", tmp_path / "pack").returncode == 0
    one_line_error(flashlm("generate", tmp_path / "pack", "--prompt", "w3"), 4, "no tokenizer")


def test_unwritable_statistics_are_refused_before_the_work(pack, tmp_path):
    done = flashlm("generate", pack, "--prompt", "w3", "--dram", "4GiB", "--stats", tmp_path / "none" / "x.json")
    one_line_error(done, 2, "can't be written")
    assert done.stdout == ""


def test_eval_compares_modes(pack, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + index * 7 % 90}" for index in range(120)))
    asked = ("eval", pack, "--text", text, "--window", "50", "--dram", "4GiB", "--mode", "hybrid", "--mode", "naive")
    done = flashlm(*asked, "--json")
    assert done.returncode == 0, done.stderr
    hybrid, naive = json.loads(done.stdout)["modes"]
    assert hybrid["perplexity"] == naive["perplexity"] > 1
    assert hybrid["num_tokens"] == 49 + 49 + 19
    one_line_error(flashlm("eval", pack, "--text", text, "--mode", "sparse"), 2, "flashlm calibrate")
    one_line_error(flashlm("eval", pack, "--text", tmp_path / "none.txt"), 2, "can't be read")
    text.write_text("w3")
    one_line_error(flashlm("eval", pack, "--text", text), 2, "has 1 tokens")
