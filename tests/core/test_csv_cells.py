"""Tables of ours that a spreadsheet opens: nothing in them runs, and everything can be had back."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtl_dist.core.csv_cells import cell_as_was, csv_rows, csv_text, safe_cell

RUNS = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@pytest.mark.parametrize("first", RUNS)
def test_no_cell_begins_as_a_formula(first):
    name = f"{first}HYPERLINK(1).jpg"
    written = csv_text(("file", name), [(name, 1), ("plain", -1.5), (None, "'tis")])
    rows = list(csv.reader(io.StringIO(written, newline="")))
    assert rows == [["file", f"'{name}"], [f"'{name}", "1"], ["plain", "-1.5"], ["", "'tis"]]


@given(st.lists(st.text(st.sampled_from("'=+-@\t\r\n,\"a\uff1d"), max_size=6), min_size=1))
def test_every_cell_can_be_had_back(cells):
    assert [cell_as_was(safe_cell(cell)) for cell in cells] == cells
    header, row = csv_rows(io.StringIO(csv_text(("x",), [cells]), newline=""))
    assert (header, row) == (["x"], cells)
