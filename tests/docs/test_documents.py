from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import neq_kernels as neq
from tests.docs.pages import (
    DOCUMENTS,
    ROOT,
    SITE,
    local_links,
    modules,
    name_of,
    own_words,
    paths,
)


def in_nav(nav: object) -> list[str]:
    """The pages of a nav, however deep."""
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [page for value in values for page in in_nav(value)]


@pytest.mark.parametrize(("page", "most"), [("README.md", 90), ("benchmarks/README.md", 80)])
def test_entrances_stay_short(page: str, most: int) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= most


def test_the_snippet_of_the_readme_runs_as_pasted(tmp_path: Path) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(snippets) == 1
    script = tmp_path / "pasted.py"
    script.write_text(snippets[0])
    run = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["0", "1", "2", "3", "4"]


def test_every_page_is_in_the_nav_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(in_nav(nav)) == [page.name for page in SITE]


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    documented = re.findall(r"^(?:::: neq_kernels\.|### `neq\.)(\w+)", page, re.M)
    assert set(neq.__all__) <= set(documented)
    assert len(documented) == len(set(documented))


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    missing = [t for t in local_links(page.read_text()) if not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_commands_and_files_that_are_named_exist(page: Path) -> None:
    text = own_words(page)
    missing = {
        name
        for name in modules(text)
        for file in [ROOT / name.replace(".", "/")]
        if not file.with_suffix(".py").is_file() and not (file / "__main__.py").is_file()
    }
    missing |= {name for name in paths(text) if not (ROOT / name).is_file()}
    assert missing == set()


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "references"} <= citation.keys()
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2207.09455"}]
