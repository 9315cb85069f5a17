"""A network that puts out the clip, the step size that follows from c(γ), and a learning rate that falls."""

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import SMALL, run_script
from models import EqM
from objective import LEFT, SCHEDULES, Objective
from runs.announcement import warn_of_wide_tokens
from sampling.descent import STEPSIZE
from sampling.method import default_stepsize
from step import Recipe, network_loss
from test_train import assert_same, load, metrics, trained

LAMBDA = 4.0
CLIP = ["--predict", "clip", "--c-schedule", "linear"]


def new_network(gain: float) -> EqM:
    torch.manual_seed(0)
    return EqM((4, 8, 8), 8, 3, 32, 2, 2, 4, temporal_patch=2, clip_gain=gain)


def test_an_output_of_zero_has_the_expected_loss():
    x = torch.rand(64, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise, gamma = torch.randn_like(x), torch.rand(64)
    objective, inputs = Objective(schedule="linear", scale=LAMBDA), (torch.zeros(64, dtype=torch.long), torch.ones(64))
    loss = network_loss(new_network(LAMBDA), objective, x, noise, gamma, *inputs)
    assert loss.item() == pytest.approx(LAMBDA**2 * x.square().mean().item(), rel=1e-5)


def test_the_field_rests_where_the_clip_is_x():
    network, x = new_network(LAMBDA), torch.randn(2, 3, 4, 8, 8)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    field = network(x, torch.zeros(2), torch.arange(2))
    clip = x + field / LAMBDA
    plain = new_network(0.0)
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(clip, plain(x, torch.zeros(2), torch.arange(2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 8, 40, 250])
def test_the_default_step_size_leaves_at_most_half_a_percent_of_the_noise(schedule, steps):
    objective, noise = Objective(schedule=schedule, b=2.0 if schedule == "piecewise" else 1.0), 1.0
    stepsize = default_stepsize(objective, steps)
    for _ in range(steps):
        noise -= stepsize * objective.c(torch.tensor([1 - noise], dtype=torch.float64)).item()
    assert noise <= LEFT + 1e-9
    if schedule == "linear":
        assert stepsize == pytest.approx(max(STEPSIZE, (1 - 0.005 ** (1 / steps)) / objective.scale))
    least = objective.least_stepsize(steps)
    assert stepsize == max(STEPSIZE, least)


def test_the_published_step_size_stays_where_it_is_enough():
    assert default_stepsize(Objective(), 250) == STEPSIZE
    assert default_stepsize(Objective(path="VP"), 8) == STEPSIZE


def test_the_learning_rate_falls_to_zero_over_the_last_steps():
    linear, cosine = (Recipe(1.0, 2, 0, 0.9, schedule=name, decay_from=4, decay_to=8) for name in ("linear", "cosine"))
    assert linear.lr_at(torch.arange(9)).tolist() == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    expected = [0.5, 1, 1, 1, 1, *((1 + math.cos(math.pi * part)) / 2 for part in (0.25, 0.5, 0.75, 1))]
    assert cosine.lr_at(torch.arange(9)).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of six steps, with the clip as output and a rate that falls over the last four."""
    folder = tmp_path_factory.mktemp("clip")
    result = run_script("train.py", *flags(shapes), "--max-steps", 6, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def flags(shapes: Path) -> list:
    given = ["--lr-schedule", "linear", "--decay-steps", 4, "--num-workers", 0, "--log-every", 1, "--lr", 1e-3]
    return ["--data-path", shapes, *SMALL, "--model", "EqM-Ti/8", "--global-batch-size", 4, *CLIP, *given]


def test_a_run_with_the_clip_as_output_keeps_it_and_its_schedule(run):
    (folder,) = (run / "results").iterdir()
    config = json.loads((folder / "config.json").read_text())
    assert config["network"]["clip_gain"] == LAMBDA
    assert config["objective"]["schedule"] == "linear"
    assert [line["lr"] for line in metrics(folder)] == pytest.approx([1e-3, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_the_log_warns_of_tokens_as_wide_as_a_network_that_puts_out_the_field(run, shapes, tmp_path):
    wide = trained(tmp_path, shapes, "--model", "EqM-Ti/8", "--global-batch-size", 4, "--max-steps", 1)
    assert "WARNING a token holds 384 numbers, and the network is 128 wide" in (wide / "log.txt").read_text()
    (clip,) = (run / "results").iterdir()
    assert "numbers" not in (clip / "log.txt").read_text()


@pytest.mark.parametrize(("hidden_size", "warns"), [(24, True), (48, False)])
def test_the_warning_begins_where_a_token_is_as_wide_as_the_network(hidden_size, warns, caplog):
    warn_of_wide_tokens(EqM((4, 8, 8), 2, 3, hidden_size, 1, 2, 4, temporal_patch=2))  # 24 numbers
    assert bool(caplog.records) == warns


def test_it_is_resumed_to_the_bit(run, shapes, tmp_path):
    (straight,) = (run / "results").iterdir()
    command = ["train.py", "--data-path", shapes, "--video", "--num-workers", 0, "--log-every", 1, "--resume"]
    stopped = run_script("train.py", *flags(shapes), "--max-steps", 6, "--max-minutes", 1e-4, cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    went_on = run_script(*command, "--max-steps", 6, cwd=tmp_path)
    assert went_on.returncode == 0, went_on.stderr
    (ours,) = (tmp_path / "results").iterdir()
    for name in ("model", "ema", "opt"):
        assert_same(load(ours, 6)[name], load(straight, 6)[name])


def test_a_constant_rate_takes_the_place_of_a_kept_decay(run, shapes, tmp_path):
    (checkpoint,) = run.glob("results/*/checkpoints/0000006.pt")
    given = ["--ckpt", checkpoint, "--lr-schedule", "constant", "--max-steps", 7, "--num-workers", 0, "--log-every", 1]
    went_on = run_script("train.py", "--data-path", shapes, *SMALL[:5], "--model", "EqM-Ti/8", *given, cwd=tmp_path)
    assert went_on.returncode == 0, went_on.stderr
    assert [line["lr"] for line in metrics(next((tmp_path / "results").iterdir()))] == pytest.approx([1e-3])


def test_it_is_sampled_with_the_step_size_of_its_schedule(run, tmp_path):
    (checkpoint,) = run.glob("results/*/checkpoints/0000006.pt")
    arguments = ["--ckpt", checkpoint, "--folder", tmp_path / "s", "--num-fid-samples", 2, "--num-sampling-steps", 80]
    sampled = run_script("sample_gd.py", *arguments, cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    stepsize = (1 - 0.005 ** (1 / 80)) / LAMBDA
    assert f"step size: {stepsize:.4g}, for 80 steps" in sampled.stdout
    assert f",{stepsize}," in (tmp_path / "s" / "samples.csv").read_text()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([*CLIP, "--c-schedule", "constant"], "--predict clip has no bounded field with --c-schedule constant"),
        ([*CLIP, "--path-type", "VP"], "--predict clip needs --path-type Linear, and it is VP"),
        ([*CLIP, "--ebm", "dot"], "--predict clip needs --ebm none, and it is dot"),
        (["--decay-steps", 2], "--decay-steps needs --lr-schedule linear or cosine"),
        (
            ["--lr-schedule", "cosine", "--decay-steps", 9, "--max-steps", 6],
            "--decay-steps 9 is more than the run's 6 steps",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given, words, shapes, tmp_path):
    result = run_script("train.py", "--data-path", shapes, *SMALL, "--num-workers", 0, *given, cwd=tmp_path)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert words in line
    assert not list(tmp_path.glob("results/*"))
