"""Sizes are read and written as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm.errors import ConfigError
from flashlm.sizes import format_size, parse_size_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("8GiB", 8 << 30), ("1.5 gib", 3 << 29), ("900M", 900 << 20), ("2GB", 2 * 10**9), ("4096", 4096), (17, 17)],
)
def test_parse_reads_units(text, size_bytes):
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "8 parsecs", "-1GiB", "0", "0.0000001", "1e9", True, -5, 0])
def test_parse_refuses_what_is_no_size(text):
    with pytest.raises(ConfigError):
        parse_size_bytes(text)


@given(st.integers(1, 1 << 45))
def test_format_is_within_its_last_digit(size_bytes):
    assert parse_size_bytes(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.05)
