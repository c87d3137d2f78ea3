"""Fashion-MNIST (Xiao et al. 2017) from its four IDX files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np

FOLDER = "/usr/share/datasets/fashion-mnist"  # Debian's; FASHION_MNIST names another


def images(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 1, 28, 28] in bytes and their classes [N]; `part` is train (60,000) or t10k."""
    return _idx(f"{part}-images-idx3-ubyte.gz")[:, None], _idx(f"{part}-labels-idx1-ubyte.gz")


def _idx(name: str) -> np.ndarray:
    """An IDX file: two zero bytes, the type (8: bytes), the number of dimensions, each as int32."""
    path = Path(os.environ.get("FASHION_MNIST", FOLDER)) / name
    if not path.exists():
        raise FileNotFoundError(
            f"no Fashion-MNIST at {path}: apt install dataset-fashion-mnist (Debian, Ubuntu), or "
            "set FASHION_MNIST to a folder with the .gz files of "
            "https://github.com/zalandoresearch/fashion-mnist"
        )
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
