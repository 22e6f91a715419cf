"""The cap is real: a process that the kernel kills beyond `dram` does what users do, or refuses by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flashlm.conversion.convert import convert
from flashlm.memory.smallest import smallest_dram_bytes
from tests.models import save_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "reliability"))

import caps_child  # of the benchmarks, which are no package
from capped import CappingUnavailable, cap_method, run_capped

CHILD = Path(caps_child.__file__)
# One process each, so that what the allocator keeps of one scenario meets the next; benchmarks/reliability/caps.py runs all.
SCENARIOS = {
    "bf16": (
        "batch-8",
        "loss-512",
        "loss-and-logits-512",
        "all-logits-512",
        "scores-and-logits-batch-8",
        "scores-default-length",
        "static-cache-400000",
        "static-cache-by-generate",
        "eager-forward-2048",
        "attentions-512",
        "hidden-states-512",
        "threads",
        "logits-kept-in-a-list",
    ),
    "fp16": ("batch-8-top-p", "batch-64-top-p", "loss-512", "all-logits-512"),
}
STREAMED = """
import sys, torch, flashlm
pack, dram, num_tokens = sys.argv[1], int(sys.argv[2]), 512
model = flashlm.load(pack, dram=dram, context=num_tokens)
placement = model.flash.placement
assert placement.pinned_bytes and placement.streamed_bytes, placement
ids = torch.randint(3, 900, (1, num_tokens - 24))
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
from flashlm.memory.limits import peak_process_bytes
print(peak_process_bytes())
"""


@pytest.fixture(scope="module")
def method() -> str:
    try:
        return cap_method()
    except CappingUnavailable as error:
        pytest.skip(f"no memory limit can be set here: {error}")


def test_a_process_capped_at_dram_is_never_killed(method: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 1000}
    save_checkpoint(tmp_path / "source", "llama", max_position_embeddings=512, **shape)
    convert(tmp_path / "source", tmp_path / "pack")
    floor = json.loads(caps_child_output("floors", tmp_path / "pack", 512))["512"]
    dram_bytes = floor + (40 << 20)
    argv = [sys.executable, "-c", STREAMED, str(tmp_path / "pack"), str(dram_bytes)]
    done = run_capped(argv, limit_bytes=dram_bytes, timeout_s=240, capture=True, method=method)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= dram_bytes
    assert done.peak_bytes is None or done.peak_bytes <= dram_bytes


def caps_child_output(*arguments: object) -> str:
    """Return the last line of a child that nothing caps: budgets are measured in a process like those that will run."""
    argv = [sys.executable, str(CHILD), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=240).stdout.splitlines()[-1]


@pytest.mark.parametrize("dtype", SCENARIOS)
def test_at_the_smallest_budget_everything_works_or_is_refused_by_name(dtype: str, method: str, tmp_path: Path) -> None:
    names, pack = SCENARIOS[dtype], tmp_path / "pack"
    caps_child.make(str(pack), "qwen2", dtype)
    context = max(caps_child.SCENARIOS[name].context for name in names)
    dram_bytes = json.loads(caps_child_output("floors", pack, context))[str(context)]
    assert dram_bytes < 2 * smallest_dram_bytes(pack, context)
    argv = [sys.executable, str(CHILD), "run", str(pack), str(dram_bytes), *names]
    done = run_capped(argv, limit_bytes=dram_bytes, timeout_s=280, capture=True, method=method)
    told = {line["scenario"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert not done.was_killed, (list(told), done.stderr[-2000:])
    assert done.returncode == 0, (list(told), done.stderr[-2000:])
    assert list(told) == list(names)
    for name in names:
        assert told[name]["outcome"] == "worked" or not caps_child.SCENARIOS[name].must_work, told[name]
