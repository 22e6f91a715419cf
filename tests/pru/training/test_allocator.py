"""Freed memory stays with the process: its pages are not faulted in again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from flashlm.pru.training.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def faults_of(num_arrays):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(num_arrays):
        torch.ones(12 << 20)  # 48 MiB, more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of(40)  # until there is a hole of the size wherever one is cut from
print(faults_of(5))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc hands memory back and can be told not to")
def test_a_large_array_is_not_faulted_in_twice() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FLASHLM_KEEP_FREED_MEMORY"}
    faults = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, way], check=True, capture_output=True, env=environment
            ).stdout
        )
        for way in ("kept", "usual")
    }
    assert faults["kept"] < 100
    assert faults["usual"] > 5 * (48 << 20) // (2 << 20)  # even if the pages are huge ones
