"""The tables of ``docs/models.md``, from the committed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.common.files import RESULTS, ROOT
from benchmarks.common.markdown import escape, table
from benchmarks.common.readme_block import Block
from benchmarks.common.records import Row, load_csv
from benchmarks.zoo import summary
from benchmarks.zoo.entries import Entry

TABLE = RESULTS / "zoo.csv"
BLOCK = Block("zoo", "python -m benchmarks.zoo --publish", ROOT / "docs" / "models.md")
# One row for each family of these; of transformers, whose families are single models, one for each
# kind.
BY_FAMILY = ("torchvision", "timm")


def publish(everything: Sequence[Entry]) -> None:
    """Write the page from the table.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: models of the list are missing from it, or the page has no place for it.
    """
    have = {(row["library"], row["name"]) for row in load_csv(TABLE)[1]}
    missing = [entry.id for entry in everything if (entry.library, entry.name) not in have]
    if missing:
        raise ValueError(f"{TABLE.name}: expected a row of every model, got none of {missing}")
    BLOCK.write(published())


def published() -> str:
    """The block's text, from the committed table: Markdown."""
    header, rows = load_csv(TABLE)
    about = header["machine"]
    parts = [
        f"`{header['command']}`, {about['date'][:10]}, PyTorch {about['torch']}: {len(rows)} "
        f"models. Every row: [{TABLE.name}]({BLOCK.link(TABLE)}).",
        *_goals(rows),
        "### What is left",
        "Models with a wrong result, with less than 80 % of their MACs in neurons, in which "
        "backprop goes on, or that could not be checked:",
        *_exceptions(rows),
        "### By kind and family",
        *_groups(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _goals(rows: Sequence[Row]) -> Iterator[str]:
    lines = (goal.line(rows) for goal in summary.GOALS)
    yield _table(
        ["what", "models", "goal", ""],
        [
            [name, count, least, "ok" if reached else "**short**"]
            for name, count, least, reached in lines
        ],
    )


def _exceptions(rows: Sequence[Row]) -> Iterator[str]:
    yield _table(
        ["model", "MACs in neurons", "input gradients: computed, needed", "what"],
        [
            [
                f"{row['library']} `{row['name']}`",
                _percent(row, "mac_share"),
                f"{_percent(row, 'dgrad')}, {_percent(row, 'dgrad_needed')}".strip(", "),
                escape(str(row.get("reason", ""))),
            ]
            for row in rows
            if summary.is_exception(row)
        ],
    )


def _groups(rows: Sequence[Row]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        group = row["family"] if row["library"] in BY_FAMILY else row["section"]
        groups.setdefault((row["library"], group), []).append(row)
    yield _table(
        ["library", "family or kind", "models", "right", "≥ 95 % in neurons", "≥ 80 %", "stops"],
        [
            [
                library,
                f"`{group}`" if library in BY_FAMILY else group,
                str(len(some)),
                *(_count(goal.count, some) for goal in summary.GOALS),
            ]
            for (library, group), some in groups.items()
        ],
    )


def _count(count: Callable[[Sequence[Row]], tuple[int, int]], rows: Sequence[Row]) -> str:
    some, all_ = count(rows)
    return f"{some} of {all_}" if all_ else ""


def _percent(row: Row, name: str) -> str:
    return f"{row[name]:.1%}" if name in row else ""


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    return "\n".join(table(titles, cells))
