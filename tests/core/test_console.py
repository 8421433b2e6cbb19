"""What commands print with."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from keymgmt.console import table

COLUMNS = ["key", "kind", "why", ""]
ROWS = [
    ("local:publisher", "ed25519", "it opens three models and more", "ok"),
    ("site:a", "aes256-gcm96", "it does not answer", ""),
]


def shown(width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False).print(table(COLUMNS, ROWS))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_a_table_that_fits_is_one():
    assert shown(100) == (
        "key              kind          why\n"
        "local:publisher  ed25519       it opens three models and more  ok\n"
        "site:a           aes256-gcm96  it does not answer"
    )
    assert "local:publisher  ed25519       it opens" in shown(50)


def test_where_words_would_be_broken_each_row_is_lines_of_its_own():
    assert shown(34) == (
        "key   local:publisher\n"
        "kind  ed25519\n"
        "why   it opens three models and\n"
        "      more\n"
        "      ok\n"
        "\n"
        "key   site:a\n"
        "kind  aes256-gcm96\n"
        "why   it does not answer\n"
    )


@pytest.mark.parametrize("width", range(30, 100))
def test_no_word_is_broken_at_any_width(width):
    words = {word for row in ROWS for cell in row for word in cell.split()}
    assert words <= set(shown(width).split())
