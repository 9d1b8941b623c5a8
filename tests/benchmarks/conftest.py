from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def images_npz(tmp_path: Path) -> Path:
    """64 training and 20 test images, 8x8, two classes that differ in brightness."""
    random = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 64), ("test", 20)):
        y = np.arange(n) % 2
        x = random.integers(0, 100, (n, 8, 8)) + 120 * y[:, None, None]
        arrays |= {f"{part}_x": x.astype(np.uint8), f"{part}_y": y.astype(np.uint8)}
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path
