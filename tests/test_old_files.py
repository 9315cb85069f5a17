"""Files of an earlier version load, resume and sample as they did then."""

import csv
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from conftest import run_script
from data.packs.pack import open_pack
from drawing.pictures import read_png
from runs.checkpoint import load_checkpoint
from test_golden_losses import CLIPS, COMMON

OLD = Path(__file__).parent / "old"
GOLDEN = json.loads((OLD / "golden.json").read_text())
RUN = "results/000-EqM-Ti-8-Linear-velocity-None"
CAPTION_ROWS = 24  # of the sheet; letters depend on Pillow's version


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The old checkpoint, in a run's folder."""
    path = tmp_path / RUN / "checkpoints" / "0000010.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(lzma.decompress((OLD / "0000010.pt.xz").read_bytes()))
    return path


def test_an_old_checkpoint_has_its_seal_and_its_config(checkpoint: Path) -> None:
    assert load_checkpoint(checkpoint)["config"]["classes"] == ["CircleRight", "CircleUp", "SquareRight", "SquareUp"]


def test_an_old_checkpoint_resumes_with_the_same_losses(checkpoint: Path, tmp_path: Path) -> None:
    command = [*COMMON[:-2], *CLIPS, *"--ebm none --model EqM-Ti/8 --max-steps 15 --resume".split()]
    result = run_script("train.py", "--data-path", OLD / "pack", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / RUN / "metrics.jsonl").read_text().splitlines()]
    found = [[row["step"], row["loss"], row["grad_norm"]] for row in rows]
    np.testing.assert_allclose(found, GOLDEN["resumed"], rtol=1e-5)


def test_an_old_checkpoint_gives_the_same_samples(checkpoint: Path, tmp_path: Path) -> None:
    method = "--num-sampling-steps 20 --stepsize 0.01 --cfg-scale 1.5 --sampler ngd --mu 0.3 --global-batch-size 2"
    command = ["--ckpt", checkpoint, "--folder", "videos", "--num-fid-samples", 4, "--global-seed", 3, *method.split()]
    result = run_script("sample_gd.py", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "videos" / "samples.csv").open() as file:
        norms = [float(row["final_norm"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(norms, GOLDEN["final_norms"], rtol=1e-3)  # four digits are written
    found, expected = (read_png(path)[CAPTION_ROWS:] for path in (tmp_path / "videos-sheet.png", OLD / "sheet.png"))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_an_old_pack_has_every_byte_that_its_index_names() -> None:
    pack = open_pack(OLD / "pack", show_progress=False)
    assert (len(pack), int(pack.lengths.sum())) == (12, 120)
