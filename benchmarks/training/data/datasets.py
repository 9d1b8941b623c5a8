"""Images with labels, held in memory: the bundled subset, CIFAR-10, a folder, an .npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BUNDLED = Path(__file__).parent / "fashion_mnist_12k.npz"
AUGMENTATIONS = ("none", "flip", "crop-flip")
_SPLIT_SEED = 20220707
_IMAGE_KEYS, _LABEL_KEYS = ("x", "images"), ("y", "labels")


class DataError(ValueError):
    """A data set that cannot be read; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Images:
    """Images uint8 ``[N, C, H, W]`` and labels int64 ``[N]``, on the CPU."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.x[index], self.y[index])


@dataclass(frozen=True)
class Dataset:
    """Training, test and probe images. The probe is neither trained on nor tested on."""

    name: str
    train: Images
    test: Images
    probe: Images
    n_classes: int
    mean: Tensor
    std: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.train.x.shape[1:]
        return channels, height, width

    def normalise(self, x: Tensor) -> Tensor:
        """float32 images with the training set's mean 0 and standard deviation 1 per channel."""
        return (x.float() / 255 - self.mean) / self.std

    def to_rgb(self) -> Dataset:
        """The same images with a grey channel repeated three times."""
        if self.shape[0] == 3:
            return self

        def expand(images: Images) -> Images:
            return Images(images.x.expand(-1, 3, -1, -1), images.y)

        return replace(
            self,
            train=expand(self.train),
            test=expand(self.test),
            probe=expand(self.probe),
            mean=self.mean.expand(3, 1, 1),
            std=self.std.expand(3, 1, 1),
        )

    def training_batches(
        self, batch: int, seed: int, epoch: int, augment: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled, augmented, normalised batches; an incomplete last one is dropped.

        Order and augmentation follow from ``(seed, epoch)`` alone, so a resumed run sees what an
        uninterrupted one sees.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        for chunk in order[: self.n_batches(batch) * batch].split(batch):
            images = self.train[chunk]
            yield self.normalise(_augment(images.x, augment, generator)), images.y

    def n_batches(self, batch: int) -> int:
        """Batches per training epoch."""
        return len(self.train) // batch

    def batches(self, images: Images, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised batches in stored order, the last one possibly smaller."""
        for start in range(0, len(images), batch):
            part = images[slice(start, start + batch)]
            yield self.normalise(part.x), part.y


def load(
    spec: str,
    *,
    root: Path = Path("data"),
    probe: int = 50,
    limit_train: int | None = None,
    limit_test: int | None = None,
    image_size: int | None = None,
) -> Dataset:
    """Load a data set into memory.

    Args:
        spec: ``fashion-mnist`` (bundled: 10,000 training and 2,000 test images), ``cifar10``
            (torchvision downloads it below ``root``), a folder with one sub-folder per class
            (optionally below ``train/`` and ``test/`` or ``val/``), or an ``.npz`` file with keys
            ``train_x, train_y, test_x, test_y`` or ``x, y`` (uint8 ``[N,H,W]``, ``[N,H,W,C]`` or
            ``[N,C,H,W]``; integer labels). Without a test part, a tenth is held out.
        probe: training images held out for the controller, in every policy alike.
        limit_train, limit_test: keep only the first images of each part, the probe on top.
        image_size: resize to this height and width (area average, or bilinear when enlarging).

    Raises:
        DataError: anything missing, unreadable or of an unexpected shape, dtype or size.
    """
    path = Path(spec)
    if spec == "fashion-mnist":
        train, test = _read_npz(BUNDLED)
    elif spec == "cifar10":
        train, test = _cifar10(root)
    elif path.suffix == ".npz":
        train, test = _read_npz(path)
    elif path.is_dir():
        train, test = _read_folder(path, image_size or 32)
    else:
        raise DataError(
            f"data: expected fashion-mnist, cifar10, a folder or an .npz file, got {spec!r}"
        )
    if test is None:
        train, test = _hold_out(train, max(1, len(train) // 10))
    if len(train) <= probe:
        raise DataError(
            f"data {spec}: expected more than {probe} training images (the probe takes {probe}), "
            f"got {len(train)}"
        )
    train, probe_images = _hold_out(train, probe)
    train, test = train[slice(limit_train)], test[slice(limit_test)]
    parts = [_resized(part, image_size) for part in (train, test, probe_images)]
    mean, std = _statistics(parts[0].x)
    n_classes = 1 + max(int(part.y.max()) for part in parts if len(part))
    return Dataset(spec, parts[0], parts[1], parts[2], n_classes, mean, std)


def _hold_out(images: Images, n: int) -> tuple[Images, Images]:
    """``(rest, held out)``, the same choice for the same sizes; the rest keeps its order."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(len(images), generator=generator)
    return images[order[n:].sort().values], images[order[:n].sort().values]


def _read_npz(path: Path) -> tuple[Images, Images | None]:
    if not path.is_file():
        raise DataError(f"data: no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"data {path}: not a readable .npz file ({error or type(error).__name__})"
        ) from error
    train = _images(path, arrays, "train_") or _images(path, arrays, "")
    if train is None:
        raise DataError(
            f"data {path}: expected keys train_x and train_y, or x and y, got {sorted(arrays)}"
        )
    return train, _images(path, arrays, "test_")


def _images(path: Path, arrays: dict[str, np.ndarray], prefix: str) -> Images | None:
    x = next((arrays[prefix + key] for key in _IMAGE_KEYS if prefix + key in arrays), None)
    y = next((arrays[prefix + key] for key in _LABEL_KEYS if prefix + key in arrays), None)
    if x is None or y is None:
        return None
    where = f"data {path}, {prefix or 'whole '}part"
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise DataError(
            f"{where}: expected uint8 images with 3 or 4 dimensions, got {x.dtype} {x.shape}"
        )
    if y.dtype.kind not in "iu" or y.shape != (len(x),) or len(y) == 0 or y.min() < 0:
        raise DataError(
            f"{where}: expected {len(x)} (at least 1) labels, integers from 0, got {y.dtype} "
            f"{y.shape}"
        )
    images = torch.from_numpy(x)
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.shape[1] not in (1, 3):
        raise DataError(f"{where}: expected 1 or 3 channels, got images of shape {x.shape}")
    return Images(images.contiguous(), torch.from_numpy(y.astype(np.int64)))


def _cifar10(root: Path) -> tuple[Images, Images]:
    from torchvision.datasets import CIFAR10

    def part(train: bool) -> Images:
        try:
            found = CIFAR10(str(root), train=train, download=True)
        except Exception as error:  # torchvision raises whatever its downloader meets
            raise DataError(
                f"data cifar10: neither in {root} nor downloadable ({error})"
            ) from error
        x = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return Images(x, torch.tensor(found.targets))

    return part(True), part(False)


def _read_folder(path: Path, size: int) -> tuple[Images, Images | None]:
    if not (path / "train").is_dir():
        return _read_class_folders(path, size), None
    test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    train = _read_class_folders(path / "train", size)
    return train, _read_class_folders(test, size) if test else None


def _read_class_folders(path: Path, size: int) -> Images:
    from PIL import UnidentifiedImageError
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size)])
    try:
        folder = ImageFolder(str(path), transform=transform)
        pairs = [folder[i] for i in range(len(folder))]
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"data {path}: {error}") from error
    images = Images(torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs]))
    generator = torch.Generator().manual_seed(_SPLIT_SEED)  # folders come sorted by class
    return images[torch.randperm(len(images), generator=generator)]


def _resized(images: Images, size: int | None) -> Images:
    if size is None or tuple(images.x.shape[2:]) == (size, size):
        return images
    mode = "area" if min(images.x.shape[2:]) > size else "bilinear"
    x = F.interpolate(images.x.float(), size=(size, size), mode=mode)
    return Images(x.round().to(torch.uint8), images.y)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    values = x.float() / 255
    mean = values.mean((0, 2, 3)).view(-1, 1, 1)
    return mean, values.std((0, 2, 3)).clamp_min(1e-6).view(-1, 1, 1)


def _augment(x: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Random horizontal flips, and for ``crop-flip`` shifts by up to 4 pixels, image by image."""
    if how == "none":
        return x
    n, _, height, width = x.shape
    columns = torch.arange(width).expand(n, width)
    flipped = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    rows = torch.arange(height).expand(n, height)
    if how == "crop-flip":
        shift = torch.randint(0, 9, (2, n, 1), generator=generator)
        x, rows, columns = F.pad(x, (4, 4, 4, 4)), rows + shift[0], columns + shift[1]
    index = torch.arange(n)[:, None, None]
    return x.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
