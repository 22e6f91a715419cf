"""The cap is real: a process that the kernel kills beyond `dram` loads, takes a prompt, decodes, and is not killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashlm.pack.convert import convert
from tests.models import save_checkpoint

CGROUP = Path("/sys/fs/cgroup/memory")
SCRIPT = """
import sys, torch, flashlm
from flashlm.planner.smallest import smallest_dram_bytes
pack, group, num_tokens = sys.argv[1], sys.argv[2], 512
dram = smallest_dram_bytes(pack, num_tokens) + (40 << 20)
with open(group + "/memory.limit_in_bytes", "w") as limit:
    limit.write(str(dram))
model = flashlm.load(pack, dram=dram, context=num_tokens)
placement = model.flash.placement
assert placement.pinned_bytes and placement.streamed_bytes, placement
ids = torch.randint(3, 900, (1, num_tokens - 24))
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
from flashlm.memory.limits import peak_process_bytes
print(peak_process_bytes(), dram)
"""


@pytest.fixture
def memory_group():
    """A fresh control group without a limit yet; the child sets one of `dram`."""
    group = CGROUP / f"flashlm-test-{os.getpid()}"
    if os.geteuid() != 0 or not (CGROUP / "memory.limit_in_bytes").exists():
        pytest.skip("needs root and a version 1 memory control group")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"control groups can't be made here: {error}")
    yield group
    group.rmdir()


def test_a_process_capped_at_dram_is_never_killed(memory_group, tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 1000}
    save_checkpoint(tmp_path / "source", "llama", max_position_embeddings=512, **shape)
    convert(tmp_path / "source", tmp_path / "pack")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "pack", memory_group],
        preexec_fn=lambda: (memory_group / "cgroup.procs").write_text(str(os.getpid())),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak_bytes, dram_bytes = map(int, done.stdout.split())
    assert peak_bytes <= dram_bytes
    assert int((memory_group / "memory.max_usage_in_bytes").read_text()) <= dram_bytes
