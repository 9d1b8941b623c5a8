from __future__ import annotations

import pytest

from tests.docs.environment import (
    names_in_cpp,
    names_in_python,
    names_in_table,
    python_sources,
)
from tests.docs.pages import ROOT


def read() -> set[str]:
    """Every name that the project reads."""
    cpp = [path.read_text() for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    return names_in_python(python_sources(ROOT)) | names_in_cpp(cpp)


def test_the_table_names_what_is_read_and_nothing_else() -> None:
    listed = names_in_table((ROOT / "docs" / "environment.md").read_text())
    assert sorted(listed) == sorted(read())


def test_the_search_finds_every_way_to_read() -> None:
    sources = {
        "a": 'X = "CONSTANT"\nos.environ.get(X)\nos.environ["SUBSCRIPT"]\nos.getenv("GETENV")',
        "b": 'Y: str = "OTHER"\n"CONTAINED" in os.environ\nos.environ.pop("POPPED")',
        "c": "os.environ.get(b.Y)\n{**os.environ}",
        "d": 'from p.e import Z as z\nos.environ[z]\n[os.environ[n] for n in ("FIRST", "SECOND")]',
        "e": 'Z = "IMPORTED"',
    }
    expected = "CONSTANT SUBSCRIPT GETENV OTHER CONTAINED POPPED IMPORTED FIRST SECOND"
    assert names_in_python(sources) == set(expected.split())
    assert names_in_cpp(['x = std::getenv("ONE");', 'getenv( "TWO" )']) == {"ONE", "TWO"}


def test_a_name_that_is_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a string or the name of a constant"):
        names_in_python({"a": 'os.environ.get("NEQ_" + name)'})
