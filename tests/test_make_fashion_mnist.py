"""datasets/make_fashion_mnist.py as people run it, on IDX files made here."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, run_command

TRAIN = np.random.default_rng(0).integers(0, 256, (25, 28, 28), dtype=np.uint8)
LABELS = np.arange(25, dtype=np.uint8) % 10


def write_idx(path: Path, array: np.ndarray) -> None:
    header = np.array([0x0800 | array.ndim, *array.shape], dtype=">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, number in (("train", 25), ("t10k", 10)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", TRAIN[:number])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", LABELS[:number])
    return folder


def unpack(source: Path, *flags: object) -> subprocess.CompletedProcess:
    script = ROOT / "datasets" / "make_fashion_mnist.py"
    return run_command(sys.executable, script, source, source.parent / "out", *flags, cwd=source.parent)


def test_images_go_to_the_folders_of_their_classes_pixel_by_pixel(source):
    run = unpack(source)
    assert run.returncode == 0, run.stderr
    assert "25 images to train on and 10 to test with" in run.stdout
    out = source.parent / "out"
    assert len(list(out.glob("train/*/*.png"))) == 25
    assert len(list(out.glob("test/*/*.png"))) == 10
    assert np.array_equal(np.asarray(Image.open(out / "train" / "Trouser" / "00002.png")), TRAIN[21])


def test_a_set_can_be_cut_to_some_images_a_class(source):
    assert unpack(source, "--per-class", 2).returncode == 0
    out = source.parent / "out"
    assert {len(list(folder.iterdir())) for folder in (out / "train").iterdir()} == {2}


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "labels"])
def test_damaged_files_are_named_in_one_line(source, damage):
    images, labels = (source / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    if damage == "missing":
        images.unlink()
    elif damage == "cut":
        images.write_bytes(images.read_bytes()[:-100])
    elif damage == "other":
        write_idx(images, TRAIN[0])
    else:
        write_idx(labels, LABELS[:-1])
    run = unpack(source)
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if "error" in line]
    assert (str(source) if damage == "labels" else str(images)) in line
    assert "Traceback" not in run.stderr
