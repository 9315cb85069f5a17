"""The held-out loss of a run: always the same number for the same weights, and the training untouched by it."""

import json
from pathlib import Path

import pytest
import torch

from conftest import SMALL, run_ranks, run_script
from data.form import Form
from evaluation.held_out import LEVELS, HeldOut
from models import EqM
from objective import SCHEDULES, Objective
from test_train import assert_same, load, metrics

CPU = torch.device("cpu")
CLASSES = ("CircleRight", "CircleUp", "SquareRight", "SquareUp")
NAMES = ["held_out_loss", *(f"held_out_loss_{level + 1}" for level in range(LEVELS)), "held_out_clip_error"]


class Perfect(torch.nn.Module):
    """A network that knows the clip, and so the field."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def forward(self, x_gamma: torch.Tensor, gamma: torch.Tensor, y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        noise = (x_gamma - gamma.view(-1, 1, 1, 1, 1) * self.clip) / (1 - gamma).view(-1, 1, 1, 1, 1)
        return self.objective.target(self.clip, noise, gamma)


def held_out(path: Path, count: int) -> HeldOut:
    return HeldOut(path, count, Form(True, 16, clip_len=4, frame_interval=3), None, None, CLASSES, CPU)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_perfect_field_has_no_error_and_implies_the_clip(schedule, shapes):
    objective, ours = Objective(schedule=schedule, b=2.0 if schedule == "piecewise" else 1.0), held_out(shapes, 2)
    network = Perfect(objective)
    network.clip = torch.stack([ours.read(i)[0] for i in range(2)]).repeat_interleave(LEVELS, 0)
    found, _ = ours.measure(network, objective)
    assert list(found) == NAMES
    assert all(abs(value) < 1e-6 for value in found.values())


def test_other_paths_imply_the_clip_too():
    gamma, x, noise = torch.tensor([0.1, 0.5, 0.9]), *torch.randn(2, 3, 3, 4, 4)
    for path in ("GVP", "VP"):
        objective = Objective(path=path)
        clip = objective.clip_of(objective.interpolate(x, noise, gamma), objective.target(x, noise, gamma), gamma)
        torch.testing.assert_close(clip, x, atol=1e-3, rtol=1e-3)


def test_each_eighth_of_gamma_has_its_own_mean_and_the_samples_do_not_depend_on_their_number(shapes):
    torch.manual_seed(0)
    network = EqM((4, 16, 16), 8, 3, 32, 1, 2, 4, temporal_patch=2).eval()
    all_of_them, objective = held_out(shapes, 5), Objective()
    found, _ = all_of_them.measure(network, objective)
    levels = [found[f"held_out_loss_{level + 1}"] for level in range(LEVELS)]
    assert found["held_out_loss"] == pytest.approx(sum(levels) / LEVELS)
    assert levels[0] > 2 * levels[-1]  # c falls
    errors = all_of_them.errors(range(2), network, objective)
    assert torch.equal(errors, held_out(shapes, 2).errors(range(2), network, objective))


FLAGS = ["--num-workers", 0, "--global-batch-size", 4, "--log-every", 3, "--lr", 1e-3]


@pytest.fixture(scope="module")
def runs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of runs of six steps: without a held-out loss, with one, and with one on two ranks."""
    held = ["--eval-path", shapes, "--eval-every", 2, "--eval-samples", 6, "--keep-best", "--keep", 1]
    found = {}
    for name, given, ranks in (("plain", [], 1), ("held out", held, 1), ("two ranks", held, 2)):
        folder = tmp_path_factory.mktemp("run")
        arguments = ("train.py", "--data-path", shapes, *SMALL, *FLAGS, "--max-steps", 6, *given)
        run = run_script(*arguments, cwd=folder) if ranks == 1 else run_ranks(2, *arguments, cwd=folder)
        assert run.returncode == 0, run.stderr
        (found[name],) = (folder / "results").iterdir()
    return found


def test_training_is_untouched(runs):
    for name in ("model", "ema", "opt"):
        assert_same(load(runs["held out"], 6)[name], load(runs["plain"], 6)[name])


def test_it_stands_in_the_lines_of_its_steps(runs):
    lines = metrics(runs["held out"])
    assert [(line["step"], "held_out_loss" in line) for line in lines] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
        (6, True),
    ]
    assert set(NAMES) <= lines[-1].keys()
    assert "held-out loss: " in (runs["held out"] / "log.txt").read_text()


def test_it_is_the_same_number_on_two_ranks(runs, shapes, tmp_path):
    checkpoint = next((runs["two ranks"] / "checkpoints").glob("0000006.pt"))
    flags = ["--data-path", shapes, *SMALL, *FLAGS, "--ckpt", checkpoint, "--max-steps", 7, "--eval-every", 1]
    flags += ["--eval-path", shapes, "--eval-samples", 6, "--lr", 1e-30]  # weights stay as they are
    values = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run = run_script("train.py", *flags, cwd=folder) if ranks == 1 else run_ranks(2, "train.py", *flags, cwd=folder)
        assert run.returncode == 0, run.stderr
        (line,) = [json.loads(row) for row in next(folder.glob("results/*/metrics.jsonl")).read_text().splitlines()]
        values.append([line[name] for name in NAMES])
    assert values[0] == values[1]


def test_the_best_checkpoint_is_kept_beside_the_newest(runs):
    lines = [line for line in metrics(runs["held out"]) if "held_out_loss" in line]
    best = min(lines, key=lambda line: line["held_out_loss"])["step"]
    kept = {int(path.stem) for path in (runs["held out"] / "checkpoints").iterdir()}
    assert kept == {best, 6}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--eval-path", "damaged"], "--eval-path: CircleUp/a.avi cannot be read"),
        (["--keep-best"], "add --eval-path"),
        (["--eval-path", "gone"], "gone is not a folder"),
        (["--eval-path", "other"], "holds the class 'Star', which the run does not know"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(given, words, shapes, tmp_path):
    folder = tmp_path / "other" / "Star"
    folder.mkdir(parents=True)
    whole = next(shapes.rglob("*.avi")).read_bytes()
    (folder / "a.avi").write_bytes(whole)
    (tmp_path / "damaged" / "CircleUp").mkdir(parents=True)
    (tmp_path / "damaged" / "CircleUp" / "a.avi").write_bytes(whole[:500])
    result = run_script("train.py", "--data-path", shapes, *SMALL, *FLAGS, *given, cwd=tmp_path)
    assert result.returncode == 1
    assert words in result.stderr.splitlines()[-1]
    assert not (tmp_path / "results").exists()
