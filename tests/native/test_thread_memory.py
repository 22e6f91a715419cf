"""What every thread that calls us gets of memory, whatever it does."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from flashlm import _native

PT_TLS = 7


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_a_thread_that_calls_costs_little() -> None:
    """Thread-local memory of a library is given, and filled, as a whole: scratch of each kernel would add up in it."""
    content = Path(_native.__file__).read_bytes()
    assert content[:5] == b"\x7fELF\x02"
    (start,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", content, start + size * index) for index in range(count)]
    assert sum(header[6] for header in headers if header[0] == PT_TLS) < 192 << 10
