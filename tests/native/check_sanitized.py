"""Fails unless the native module in use is a sanitized build that ends the process at a fault.

`make sanitize` runs it first: a sanitizer that was not linked, or not loaded, would let every test pass.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from flashlm import _native

NUM_ELEMENTS = 64
FP32 = 2
# What this process does when it is asked for it: a product one element longer than its destination.
FAULTS = {"none": NUM_ELEMENTS, "overflow": NUM_ELEMENTS + 1}


def widen(num_elements: int) -> None:
    """Copy `num_elements` fp32 into room for `NUM_ELEMENTS`."""
    rows = np.zeros((1, 2 * NUM_ELEMENTS), dtype=np.float32)
    room = np.zeros(NUM_ELEMENTS, dtype=np.float32)
    claimed = np.lib.stride_tricks.as_strided(room, (1, num_elements))  # an array that says more than it has
    _native.widen(_native.RowBlock(rows, 1, _native.RowFormat.alike(rows.nbytes, num_elements, FP32, 1)), 0, claimed)


def main() -> int:
    """Return the exit status."""
    if len(sys.argv) > 1:
        widen(FAULTS[sys.argv[1]])
        return 0
    where = Path(_native.__file__)
    if "libasan" not in Path("/proc/self/maps").read_text() or b"__asan_report" not in where.read_bytes():
        print(f"{where} is not a sanitized build", file=sys.stderr)
        return 1
    for fault, is_sound in (("none", True), ("overflow", False)):
        run = subprocess.run([sys.executable, __file__, fault], capture_output=True, text=True)
        is_reported = "AddressSanitizer: heap-buffer-overflow" in run.stderr and "widen" in run.stderr
        if (run.returncode == 0) != is_sound or is_reported == is_sound:
            print(f"fault {fault}: exit {run.returncode}\n{run.stderr}", file=sys.stderr)
            return 1
    print(f"{where.name} is a sanitized build: it reports a planted overflow")
    return 0


if __name__ == "__main__":
    sys.exit(main())
