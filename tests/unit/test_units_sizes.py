"""Sizes: decimal where the unit says so, binary otherwise, and nothing that is not a size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfvol.errors import InvalidError
from pfvol.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4096", 4096),
        ("1GiB", 1024**3),
        ("1G", 1024**3),
        ("1g", 1024**3),
        ("800MB", 800_000_000),
        ("1.5TiB", 3 * 1024**4 // 2),
        ("2 MiB", 2 * 1024**2),
        ("1PB", 1000**5),
        ("0.5KiB", 512),
        (" 1M ", 1024**2),
    ],
)
def test_what_people_write(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "1XB", "1GG", "-1", "1e9", "0x10", "1,5G", "1.G", "nan", "0.3", "9EiB", "9" * 40, "1 G iB", "१"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidError):
        parse_size(text)


@given(st.integers(1, 2**20), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
def test_a_whole_size_is_printed_in_a_unit_that_reads_back_close(count: int, unit: str) -> None:
    size_bytes = parse_size(f"{count}{unit}")
    number, shown = format_size(size_bytes).split()
    assert abs(float(number) * parse_size(f"1{shown}") - size_bytes) <= size_bytes * 0.005


def test_small_and_nothing() -> None:
    assert format_size(0) == "0 B"
    assert format_size(1023) == "1023 B"
    assert format_size(3 * 1024**3 // 2) == "1.5 GiB"
