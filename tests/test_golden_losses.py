"""New runs follow the losses that an earlier version had, step by step.

All flags that change a loss are given, so that a new default is not taken for a fault. Recipes that are newer than
tests/old/ have their losses in golden_losses.json.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import run_script

OLD = Path(__file__).parent / "old"
COMMON = (
    "--vae none --num-workers 0 --path-type Linear --c-schedule truncated --c-a 0.8 --c-lambda 4 --uncond"
    " --global-batch-size 4 --micro-batch-size 4 --lr 1e-3 --warmup-steps 5 --grad-clip 1 --ema-decay 0.99"
    " --max-bad-steps 20 --global-seed 7 --optimizer adamw --no-compile --log-every 1 --epochs 1000 --max-steps 20"
).split()
IMAGES = [*COMMON, *"--image-size 16 --num-classes 3 --model EqM-Ti/4".split()]
CLIPS = "--video --clip-len 4 --frame-interval 2 --temporal-patch 2 --image-size 16 --num-classes 4".split()
RECIPES = {
    "video": [*COMMON, *CLIPS, "--model", "EqM-Ti/4", "--ebm", "none"],
    "images": [*IMAGES, "--ebm", "none"],
    "energy": [*IMAGES, "--ebm", "dot"],
    "clip": [*IMAGES, "--ebm", "none", "--predict", "clip", "--c-schedule", "linear"],
    "clip, truncated": [*IMAGES, "--ebm", "none", "--predict", "clip"],
    "clip, piecewise": [*COMMON, *CLIPS, *"--model EqM-Ti/8 --predict clip --c-schedule piecewise --c-b 2".split()],
    "weight": [*IMAGES, *"--ebm none --loss-weight min-snr --gamma-distribution logit-normal --gamma-std 2".split()],
    "decay": [*IMAGES, "--ebm", "none", "--lr-schedule", "cosine", "--decay-steps", "10"],
    "muon": [*IMAGES, "--ebm", "none", "--optimizer", "muon"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders of noise, always the same."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("Blue", "Red"):
        (folder / name).mkdir()
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_20_steps_have_the_losses_of_an_earlier_version(recipe: str, pictures: Path, tmp_path: Path) -> None:
    data = OLD / "pack" if "--video" in RECIPES[recipe] else pictures
    result = run_script("train.py", "--data-path", data, *RECIPES[recipe], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (metrics,) = tmp_path.glob("results/*/metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    known = json.loads((OLD / "golden.json").read_text())["losses"]
    expected = (known | json.loads(OLD.with_name("golden_losses.json").read_text()))[recipe]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
