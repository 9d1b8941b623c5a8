from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.training.data import datasets
from benchmarks.training.data.datasets import DataError


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def grey(n: int, size: int = 6) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, size, size)).astype(np.uint8)


def test_bundled_subset_is_balanced_and_probe_is_held_out() -> None:
    data = datasets.load("fashion-mnist", probe=50)
    assert (len(data.train), len(data.test), len(data.probe)) == (9950, 2000, 50)
    assert data.shape == (1, 28, 28)
    assert data.n_classes == 10
    assert data.test.y.bincount().tolist() == [200] * 10
    trained = {bytes(image.numpy().tobytes()) for image in data.train.x}
    assert not any(bytes(image.numpy().tobytes()) in trained for image in data.probe.x)


def test_limits_keep_the_probe_on_top() -> None:
    data = datasets.load("fashion-mnist", probe=20, limit_train=100, limit_test=30)
    assert (len(data.train), len(data.test), len(data.probe)) == (100, 30, 20)


def test_normalised_training_images_have_mean_0_and_deviation_1() -> None:
    data = datasets.load("fashion-mnist", limit_train=500)
    x = data.normalise(data.train.x)
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3


@pytest.mark.parametrize(("size", "shape"), [(14, (1, 14, 14)), (40, (1, 40, 40))])
def test_image_size(size: int, shape: tuple[int, int, int]) -> None:
    assert datasets.load("fashion-mnist", limit_train=20, image_size=size).shape == shape


@pytest.mark.parametrize("augment", datasets.AUGMENTATIONS)
def test_order_and_augmentation_follow_from_seed_and_epoch(augment: str) -> None:
    data = datasets.load("fashion-mnist", limit_train=60)

    def epoch(seed: int, epoch: int) -> list[torch.Tensor]:
        return [x for x, _ in data.training_batches(25, seed, epoch, augment)]

    first = epoch(3, 5)
    assert [x.shape for x in first] == [(25, 1, 28, 28)] * 2 == [x.shape for x in epoch(3, 6)]
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(3, 5), strict=True))
    assert not torch.equal(first[0], epoch(3, 6)[0])
    assert not torch.equal(first[0], epoch(4, 5)[0])


def test_flip_mirrors_about_half_of_the_images_and_changes_nothing_else() -> None:
    data = datasets.load("fashion-mnist", limit_train=200)
    generator = torch.Generator().manual_seed(0)
    flipped = datasets._augment(data.train.x, "flip", generator)
    same = (flipped == data.train.x).flatten(1).all(1)
    mirrored = (flipped == data.train.x.flip(3)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 60 < int(mirrored.sum()) < 140


def test_crop_shifts_with_zeros_coming_in() -> None:
    x = torch.full((50, 3, 8, 8), 255, dtype=torch.uint8)
    cropped = datasets._augment(x, "crop-flip", torch.Generator().manual_seed(0))
    assert cropped.shape == x.shape
    kept = (cropped[:, 0] > 0).sum((1, 2))
    assert int(kept.min()) < 64
    assert int(kept.min()) >= 16
    assert cropped.unique().tolist() == [0, 255]


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
def test_npz_layouts(tmp_path: Path, layout: str) -> None:
    x = grey(30)
    if layout == "NHWC":
        x = np.stack([x] * 3, axis=-1)
    elif layout == "NCHW":
        x = np.stack([x] * 3, axis=1)
    data = datasets.load(save(tmp_path / "a.npz", x=x, y=np.arange(30) % 3), probe=5)
    assert data.shape == (1 if layout == "NHW" else 3, 6, 6)
    assert data.n_classes == 3
    assert len(data.train) + len(data.test) + len(data.probe) == 30
    assert len(data.test) == 3


def test_grey_to_rgb() -> None:
    data = datasets.load("fashion-mnist", limit_train=20).to_rgb()
    assert data.shape == (3, 28, 28)
    x = data.normalise(data.train.x)
    assert torch.equal(x[:, 0], x[:, 2])


def test_folder_with_and_without_a_test_part(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name, value in (("cat", 10), ("dog", 200)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (20, 16), (value, i, 0)).save(folder / f"{i}.png")
    data = datasets.load(str(tmp_path), probe=4, image_size=8)
    assert data.shape == (3, 8, 8)
    assert (len(data.train), len(data.probe), len(data.test)) == (16, 4, 20)
    assert set(data.train.x[data.train.y == 1][:, 0].unique().tolist()) == {200}
    whole = datasets.load(str(tmp_path / "train"), probe=4, image_size=8)
    assert (len(whole.train), len(whole.probe), len(whole.test)) == (14, 4, 2)


def test_cifar10_that_is_not_there_and_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    def offline(self: CIFAR10) -> None:
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(DataError, match=r"neither in .* nor downloadable .*no network"):
        datasets.load("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": grey(9)}, "expected keys train_x and train_y, or x and y, got"),
        ({"x": grey(9).astype(np.float32), "y": np.arange(9)}, "expected uint8 images"),
        ({"x": grey(9)[0], "y": np.arange(6)}, "3 or 4 dimensions"),
        ({"x": grey(9), "y": np.arange(8)}, "expected 9 .* labels"),
        ({"x": grey(9), "y": np.arange(9.0)}, "labels, integers from 0"),
        ({"x": grey(9), "y": np.arange(9) - 1}, "labels, integers from 0"),
        ({"x": grey(0), "y": np.arange(0)}, "at least 1"),
        ({"x": np.stack([grey(9)] * 2, 1), "y": np.arange(9)}, "1 or 3 channels"),
        ({"x": grey(9), "y": np.arange(9)}, "more than 50 training images"),
        ({"x": np.array([{}] * 9, dtype=object), "y": np.arange(9)}, "not a readable"),
    ],
)
def test_unusable_arrays(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        datasets.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_corrupt_npz(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "corrupt.npz"
    save(path, train_x=grey(90), train_y=np.arange(90))
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 3] ^= 0xFF
    else:
        content = bytearray(b"" if damage == "empty" else b"not an archive")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"corrupt\.npz: not a readable \.npz file"):
        datasets.load(str(path))


def test_neither_name_nor_file() -> None:
    with pytest.raises(DataError, match="no such file"):
        datasets.load("missing.npz")
    with pytest.raises(DataError, match=r"expected fashion-mnist, cifar10, a folder or an \.npz"):
        datasets.load("mnist")
