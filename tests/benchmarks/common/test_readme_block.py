"""Blocks of pages, and those that are committed: rebuilt from committed files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.common.readme_block import RESULTS_PAGE, Block
from benchmarks.kernels import roofline
from benchmarks.suite import page as suite
from benchmarks.training.report import publish

PUBLISHERS = {module.BLOCK.name: module for module in (publish, roofline, suite)}


@pytest.fixture
def block(tmp_path: Path) -> Block:
    block = Block("name", "python -m module", tmp_path / "page.md")
    block.page.write_text(f"before\n{block.begin}old\n{block.end}after\n")
    return block


def test_only_the_block_is_replaced(block: Block) -> None:
    assert block.text() == "old\n"
    page = block.page.read_text()
    block.write("new\n")
    assert block.text() == "new\n"
    assert block.page.read_text() == page.replace("old", "new")
    assert [path.name for path in block.page.parent.iterdir()] == ["page.md"]


@pytest.mark.parametrize("missing", ["begin", "end"])
def test_a_page_without_a_marker_is_refused_and_left_alone(block: Block, missing: str) -> None:
    marker = getattr(block, missing)
    page = block.page.read_text().replace(marker, "")
    block.page.write_text(page)
    for call in (block.text, lambda: block.write("new\n")):
        with pytest.raises(ValueError, match="expected the lines '<!-- name: begin") as refused:
            call()
        assert str(block.page) in str(refused.value)
        assert marker.strip() in str(refused.value)
    assert block.page.read_text() == page


def test_links_lead_from_the_page(block: Block) -> None:
    assert block.link(block.page.parent.parent / "results" / "x.png") == "../results/x.png"


def test_every_block_of_the_results_has_a_publisher() -> None:
    assert set(re.findall(r"<!-- (\w+): begin", RESULTS_PAGE.read_text())) == set(PUBLISHERS)


@pytest.mark.parametrize("name", PUBLISHERS)
def test_committed_blocks_are_made_of_committed_files(name: str) -> None:
    module = PUBLISHERS[name]
    assert module.BLOCK.text() == module.published()
    command = module.BLOCK.command.split()[2]
    assert command in (module.__name__, module.__package__)
