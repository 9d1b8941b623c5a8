"""A run folder: settings, metrics, checkpoint. Everything survives a kill at any moment.

::

    config.json        settings and environment, written once
    profile.json       shares of the dense step measured at the start (the bound is made of them)
    metrics.jsonl      one line per epoch
    summary.csv        the same as a flat table
    checkpoint.pt      model, optimizer, controller, RNG after the last whole epoch
    weights.safetensors  final weights, a plain state_dict
    *.png, report.html
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.files import replace_file, write_csv

FORMAT = 1


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says why and what is untouched."""


class RunFolder:
    """The files of one run below ``path``.

    Files are replaced whole (written beside, flushed, renamed), so a reader never sees half of
    one; only ``metrics.jsonl`` grows line by line, and what lies beyond the checkpoint's epoch is
    dropped upon resuming.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        return self.has("config.json")

    def create(self, config: dict[str, Any]) -> None:
        """Make the folder and write its configuration.

        Raises:
            RunError: it already holds a run, or cannot be made.
        """
        self.refuse_existing()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be made ({error})") from error
        self.write_json("config.json", {"format": FORMAT, **config})

    def refuse_existing(self) -> None:
        """Raises RunError if the folder already holds a run."""
        if self.exists:
            raise RunError(
                f"{self.path}: already holds a run; continue it with --resume or choose another "
                "--out"
            )

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def config(self) -> dict[str, Any]:
        """Raises RunError when there is no readable run here."""
        config = self.read_json("config.json")
        if config.get("format") != FORMAT:
            raise RunError(
                f"{self.path}: expected a run of format {FORMAT}, got {config.get('format')}"
            )
        return config

    def read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError:
            raise RunError(f"{path}: no such file; there is no run to read here") from None
        except ValueError as error:
            raise RunError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise RunError(f"{path}: expected a JSON object, got {type(value).__name__}")
        return value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        replace_file(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def append_metrics(self, record: dict[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of ``metrics.jsonl``; a last line cut short by a kill is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        *lines, _cut_short = path.read_text().split("\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunError(f"{path}: not valid JSON lines ({error})") from error

    def keep_metrics_before(self, epoch: int) -> None:
        """Drop the records of ``epoch`` and later."""
        kept = [record for record in self.metrics() if record["epoch"] < epoch]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        replace_file(self.path / "metrics.jsonl", text.encode())

    def write_csv(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        write_csv(self.path / name, rows)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        replace_file(self.path / "checkpoint.pt", buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, or None when no epoch was finished.

        Raises:
            RunError: it cannot be read; nothing in the folder is changed.
        """
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load checks no checksums
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling garbage raises anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"{path}: the checkpoint cannot be read ({reason}). Nothing was changed; put a "
                "good copy in its place, or move it away to train from the start again"
            ) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise RunError(f"{path}: expected a checkpoint of format {FORMAT}. Nothing was changed")
        return state
