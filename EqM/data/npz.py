"""Reads samples from an .npz."""

import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from runtime.errors import UserError, first_line

NPZ_SHAPES = "(N, H, W, 3) images or (N, T, H, W, 3) clips"


@lru_cache(maxsize=2)
def read_npz(path: Path) -> np.ndarray:
    """The `arr_0` of an .npz, where EqM/sample_gd.py puts images: NPZ_SHAPES, uint8.

    Floats in [0, 1] are rounded to uint8.

    Raises:
        UserError: it is not an .npz, or its arr_0 has another shape or is not pixels.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            samples = file["arr_0"]
    except KeyError:
        raise UserError(f"{path} has no arr_0: save the samples with numpy.savez(path, samples)") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
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
