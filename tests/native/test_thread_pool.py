"""The pool of the kernels: callers side by side, a forked child, the end of the interpreter, the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from flashlm import _native
from flashlm.rows.kernels import matrix_rows

_SETUP = """
import os  # no torch: a fork of its own pool hangs, and its import is slow
import numpy
from flashlm import _native
source = numpy.ones((512, 1024), numpy.float32)
rows = _native.RowBlock(source, 512, _native.RowFormat.alike(4096, 1024, 2, 1))
def run():
    dst = numpy.zeros_like(source)
    _native.widen(rows, 0, dst)
    return bool((dst == source).all())
_native.set_num_threads(3)
assert run()
"""


def _python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_callers_on_several_threads_get_their_own_results():
    before = _native.num_threads()
    _native.set_num_threads(3)
    wrong: list[int] = []

    def work(value: int) -> None:
        source = torch.full((64, 4096), float(value))
        dst, rows = torch.empty(64, 4096), matrix_rows(source)
        for _ in range(50):
            dst.zero_()
            _native.widen(rows, 0, dst)
            if not bool((dst == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _native.set_num_threads(before)
    assert wrong == []


def test_a_forked_child_has_a_pool_of_its_own():
    program = _SETUP + (
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if _native.num_threads() == 3 and run() else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and run()\n"
    )
    result = _python(program)
    assert result.returncode == 0, result.stderr


def test_the_interpreter_exits_while_workers_sleep_or_change():
    result = _python(_SETUP + "_native.set_num_threads(2); assert run(); _native.set_num_threads(4); assert run()\n")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("level", _native.simd_levels())
def test_the_environment_can_lower_the_instruction_set(level: str):
    result = _python("from flashlm import _native; print(_native.simd_level())", FLASHLM_SIMD=level)
    assert result.stdout.strip() == level


def test_an_unknown_instruction_set_in_the_environment_is_refused():
    result = _python("from flashlm import _native; _native.simd_level()", FLASHLM_SIMD="avx1024")
    assert result.returncode != 0
    assert "'avx1024' is not supported here" in result.stderr
