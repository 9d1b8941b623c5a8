from __future__ import annotations

from benchmarks.common.markdown import escape, table


def test_escaped_text_has_no_markup() -> None:
    assert escape("a | *b* `c` <i> & d\\e") == r"a \| \*b\* \`c\` &lt;i> &amp; d\\e"
    assert escape("first\nsecond") == "first<br>second"
    assert escape("snake_case[0] - 1.5") == "snake_case[0] - 1.5"


def test_a_table() -> None:
    assert table(["a", "b"], [["1", "2"], ["", "x"]]) == [
        "| a | b |",
        "|---|---|",
        "| 1 | 2 |",
        "|  | x |",
    ]
