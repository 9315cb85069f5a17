"""Reads samples, and their labels, from an .npz."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from runtime.errors import UserError, first_line
from runtime.files import open_regular

NPZ_SHAPES = "(N, H, W, 3) images or (N, T, H, W, 3) clips"


def read_array(path: Path, name: str) -> np.ndarray | None:
    """An array of an .npz; None if it has none of that name. Raises UserError if it is no .npz that can be read."""
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as archive:
            return np.asarray(archive[name]) if name in archive else None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # archives that are damaged, encrypted or made to do harm raise errors of many types
        raise UserError(f"{path} is no .npz that can be read: {first_line(error)}") from None


def npz_labels(path: Path) -> np.ndarray | None:
    """The `labels` of an .npz, (N,): whole numbers or texts. None if it has none. Raises UserError for other labels."""
    labels = read_array(path, "labels")
    if labels is None or (labels.ndim == 1 and labels.dtype.kind in "iuU"):
        return labels
    raise UserError(
        f"{path}: its labels are {labels.dtype} of the shape {labels.shape}: save (N,) whole numbers or names"
    )


@lru_cache(maxsize=2)
def read_npz(path: Path) -> np.ndarray:
    """The `arr_0` of an .npz, where EqM/sample_gd.py puts images: NPZ_SHAPES, uint8.

    Floats in [0, 1] are rounded to uint8.

    Raises:
        UserError: it is not an .npz, or its arr_0 has another shape or is not pixels.
    """
    samples = read_array(path, "arr_0")
    if samples is None:
        raise UserError(f"{path} has no arr_0: save the samples with numpy.savez(path, samples)")
    if samples.ndim not in (4, 5) or samples.shape[-1] != 3 or not samples.size:
        raise UserError(f"{path}: arr_0 has the shape {samples.shape}: save {NPZ_SHAPES}")
    if samples.dtype == np.uint8:
        return samples
    if samples.dtype.kind != "f":
        raise UserError(f"{path}: arr_0 is {samples.dtype}: save pixels as uint8, or as floats in [0, 1]")
    bad = ~np.isfinite(samples).reshape(len(samples), -1).all(1)  # (N,)
    if bad.any():
        first = int(bad.argmax())
        raise UserError(f"{path}: {bad.sum()} of {len(bad)} samples, the first at {first}, have pixels that are NaN")
    if samples.min() < 0 or samples.max() > 1:
        found = f"from {samples.min():.4g} to {samples.max():.4g}"
        raise UserError(f"{path}: its floats go {found}, outside [0, 1]: if they are in [-1, 1], save (x + 1) / 2")
    return np.rint(samples * 255).astype(np.uint8)
