"""The table of ``docs/models.md``, from the committed rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.common.files import RESULTS, ROOT
from benchmarks.common.markdown import escape, table
from benchmarks.common.readme_block import Block
from benchmarks.common.records import Row, load_csv
from benchmarks.zoo import summary
from benchmarks.zoo.entries import LIBRARIES, Entry

TABLE = RESULTS / "zoo.csv"
BLOCK = Block("zoo", "python -m benchmarks.zoo --publish", ROOT / "docs" / "models.md")
MOST_LEFT = 0.80


def publish(everything: Sequence[Entry]) -> None:
    """Write the page from the table.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: models of the list are missing from it, or the page has no place for it.
    """
    header, rows = load_csv(TABLE)
    have = {(row["library"], row["name"]) for row in rows}
    missing = [entry.id for entry in everything if (entry.library, entry.name) not in have]
    if missing:
        raise ValueError(f"{TABLE.name}: expected a row of every model, got none of {missing}")
    BLOCK.write(text(header, rows))


def text(header: Row, rows: Sequence[Row]) -> str:
    """The block: Markdown."""
    about = header["machine"]
    return "\n".join(
        [
            f"`{header['command']}`, {about['date'][:10]}, PyTorch {about['torch']}. "
            f"Every row: [{TABLE.name}]({BLOCK.link(TABLE)}).",
            "",
            *_goals(rows),
            "",
            *_families(rows),
            "",
            *_exceptions(rows),
            "",
        ]
    )


def _goals(rows: Sequence[Row]) -> Iterator[str]:
    yield from table(
        ["what", "models", "goal", ""],
        [
            [name, count, least, "ok" if reached else "**short**"]
            for name, count, least, reached in (goal.line(rows) for goal in summary.GOALS)
        ],
    )


def _families(rows: Sequence[Row]) -> Iterator[str]:
    cells = []
    for library in LIBRARIES:
        own = [row for row in rows if row["library"] == library]
        for family in dict.fromkeys(row["family"] for row in own):
            some = [row for row in own if row["family"] == family]
            shares = [row["mac_share"] for row in summary.checked(some)]
            stops = [row["stop"] for row in some if row.get("stop", "") != ""]
            cells.append(
                [
                    library,
                    f"`{family}`",
                    ", ".join(f"`{row['name']}`" for row in some),
                    _right(some),
                    _percent(shares),
                    f"{sum(stops)} of {len(stops)}" if stops else "",
                ]
            )
    yield from table(
        ["library", "family", "models", "results", "MACs in neurons", "backprop stops"], cells
    )


def _right(rows: Sequence[Row]) -> str:
    if not summary.checked(rows):
        return "not checked"
    return "**wrong**" if summary.wrong(rows) else "right"


def _percent(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    return f"{min(shares):.1%}" if len(shares) == 1 else f"{min(shares):.1%}–{max(shares):.1%}"


def _exceptions(rows: Sequence[Row]) -> Iterator[str]:
    named = [row for row in rows if row.get("reason") or _share(row) < MOST_LEFT]
    yield "Models of which something is to be said:"
    yield ""
    yield from table(
        ["model", "MACs in neurons", "what"],
        [
            [
                f"`{row['library']}/{row['name']}`",
                f"{row['mac_share']:.1%}" if row.get("mac_share", "") != "" else "",
                escape(str(row.get("reason", ""))[:200]),
            ]
            for row in named
        ],
    )


def _share(row: Row) -> float:
    share = row.get("mac_share", "")
    return 1.0 if share == "" else float(share)
