"""How much each γ counts in the loss: weights of the error, and the distribution of γ."""

import json
from pathlib import Path

import pytest
import torch

from compiled import EAGER
from conftest import SMALL, run_script
from data.form import Form
from evaluation.held_out import HeldOut
from models import EqM
from objective import LOSS_WEIGHTS, SCHEDULES, Objective
from precision import Precision
from runs.config import config_of
from state import TrainingState
from step import Recipe, training_step
from test_kept_flags import CONFIG
from test_objective import parsed

CPU = torch.device("cpu")
NORMAL = "logit-normal"


def draws(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data, noise, and γ from 0 to 1."""
    x, noise = 0.5 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return x, 2 * noise, torch.linspace(0, 1, shape[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_is_the_squared_error_of_the_implied_clip(schedule):
    x, noise, gamma = draws((9, 3, 2, 4, 4))
    settings = {"schedule": schedule, "a": 0.6, "b": 2.0, "scale": 3.0}
    field = torch.randn(x.shape)
    plain = Objective(**settings)
    clip = plain.clip_of(plain.interpolate(x, noise, gamma), field, gamma)
    by_sample = (clip - x).square().flatten(1).mean(1)  # (N,)
    snr = torch.tensor([min(g * g / (1 - g) ** 2, 5.0) if g < 1 else 5.0 for g in gamma.tolist()])
    for weight, expected in (("clip", by_sample.mean()), ("min-snr", (by_sample * snr).mean())):
        loss = Objective(**settings, loss_weight=weight).loss(lambda *_: (field, None), x, noise, gamma)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_field_of_zero_implies_the_noisy_clip(schedule):
    x, noise, _ = draws((8192, 64))
    gamma = (torch.arange(8192) + 0.5) / 8192
    objective = Objective(schedule=schedule, loss_weight="clip")
    loss = objective.loss(lambda x_gamma, _: (torch.zeros_like(x_gamma), None), x, noise, gamma)
    assert loss.item() == pytest.approx((1 + 0.25) / 3, rel=0.01)  # E[(1 − γ)²]·(E[x²] + 1)


@pytest.mark.parametrize("weight", LOSS_WEIGHTS)
def test_a_weight_is_finite_and_has_the_shape_of_gamma(weight):
    gamma = torch.linspace(0, 1, 12).view(3, 4)
    found = Objective(loss_weight=weight).weight(gamma)
    assert found.shape == gamma.shape
    assert found.isfinite().all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.5, 0.5)])
def test_a_logit_normal_gamma_has_the_mean_and_deviation_asked_for(mean, std):
    uniform = torch.rand(100, 1000, generator=torch.Generator().manual_seed(0))
    gamma = Objective(gamma_distribution=NORMAL, gamma_mean=mean, gamma_std=std).drawn_gamma(uniform)
    logits = gamma.double().logit()
    assert logits.mean().item() == pytest.approx(mean, abs=0.02)
    assert logits.std().item() == pytest.approx(std, rel=0.02)
    assert (gamma.flatten()[uniform.flatten().argsort()].diff() >= 0).all()


def test_the_ends_of_the_uniform_numbers_give_a_gamma_from_0_to_1():
    ends = torch.tensor([[0.0, 2.0**-24], [1 - 2.0**-24, 1.0]])  # 1: a clean frame, which stays clean
    gamma = Objective(gamma_distribution=NORMAL, gamma_mean=10.0, gamma_std=10.0).drawn_gamma(ends)
    assert ((gamma >= 0) & (gamma <= 1)).all()
    assert gamma[1, 1] == 1
    assert Objective().drawn_gamma(ends) is ends


def after_a_step(objective: Objective) -> tuple[float, torch.Tensor]:
    """The loss of a step, and the state of the generator after it."""
    torch.manual_seed(0)
    state = TrainingState(EqM(8, 4, 3, 32, 1, 2, 4), Precision("fp32", "fp32", torch.float32), CPU)
    step = training_step(state, Recipe(1e-3, 0, 0.0, 0.9, objective=objective), 4, 0, EAGER)
    loss, _ = step(torch.ones(4, 3, 8, 8), torch.arange(4), torch.ones(4))
    return loss.item(), state.generator.get_state()


def test_random_numbers_stay_as_they_are_whatever_counts():
    plain, state = after_a_step(Objective())
    for objective in (Objective(loss_weight="clip"), Objective(gamma_distribution=NORMAL)):
        loss, after = after_a_step(objective)
        assert torch.equal(after, state)
        assert loss != plain
    late, _ = after_a_step(Objective(gamma_distribution=NORMAL, gamma_mean=6.0))
    assert late < 0.01 * plain  # near the data c is small


def test_the_held_out_loss_is_uniform_in_gamma_and_unweighted(shapes: Path):
    torch.manual_seed(0)
    network = EqM((4, 16, 16), 8, 3, 32, 1, 2, 4, temporal_patch=2).eval()
    classes = tuple(sorted(path.name for path in shapes.iterdir()))
    held_out = HeldOut(shapes, 2, Form(True, 16, clip_len=4, frame_interval=3), None, None, classes, CPU)
    weighted = Objective(loss_weight="min-snr", gamma_distribution=NORMAL, gamma_mean=1.0)
    assert held_out.measure(network, weighted)[0] == held_out.measure(network, Objective())[0]


def test_flags_make_the_objective():
    given = "--loss-weight min-snr --gamma-distribution logit-normal --gamma-mean -0.5 --gamma-std 1.5".split()
    expected = Objective(loss_weight="min-snr", gamma_distribution="logit-normal", gamma_mean=-0.5, gamma_std=1.5)
    assert parsed(*given) == expected
    assert parsed(*given[2:4]) == Objective(gamma_distribution="logit-normal")


def test_a_config_without_them_has_the_field_and_a_uniform_gamma():
    old = CONFIG.as_dict()
    for key in ("loss_weight", "gamma_distribution", "gamma_mean", "gamma_std"):
        del old["objective"][key]
    config = config_of(old, "old.pt")
    assert config == CONFIG
    kept = config.kept_flags()
    assert (kept["loss_weight"], kept["gamma_distribution"]) == ("field", "uniform")
    assert (kept["gamma_mean"], kept["gamma_std"]) == (None, None)


FLAGS = ["--num-workers", 0, "--global-batch-size", 4, "--model", "EqM-Ti/8"]
GIVEN = ["--loss-weight", "clip", "--gamma-distribution", "logit-normal", "--gamma-mean", 0.5]


def test_a_run_keeps_them(shapes: Path, tmp_path: Path):
    command = ["train.py", "--data-path", shapes, *SMALL, *FLAGS]
    begun = run_script(*command, *GIVEN, "--max-steps", 1, cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    went_on = run_script(*command[:4], "--num-workers", 0, "--resume", "--max-steps", 2, cwd=tmp_path)
    assert went_on.returncode == 0, went_on.stderr
    (folder,) = (tmp_path / "results").iterdir()
    objective = json.loads((folder / "config.json").read_text())["objective"]
    assert (objective["loss_weight"], objective["gamma_mean"], objective["gamma_std"]) == ("clip", 0.5, 1.0)
    checkpoint = folder / "checkpoints" / "0000002.pt"
    for change, words in (
        (["--loss-weight", "field"], "the objective's loss_weight clip, and this run has field"),
        (["--gamma-distribution", "uniform"], "the objective's gamma_distribution logit-normal, and this run has uni"),
    ):
        refused = run_script(*command[:4], "--num-workers", 0, "--ckpt", checkpoint, *change, cwd=tmp_path)
        assert refused.returncode == 1
        assert words in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--loss-weight", "clip", "--path-type", "GVP"], "--loss-weight clip needs --path-type Linear, and it is GVP"),
        (["--gamma-std", 2], "--gamma-mean and --gamma-std need --gamma-distribution logit-normal: add it"),
        (["--gamma-distribution", "logit-normal", "--gamma-std", 0], "'0' is not a number from 0.01 to 10"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given, words, shapes, tmp_path):
    result = run_script("train.py", "--data-path", shapes, *SMALL, *FLAGS, *given, cwd=tmp_path)
    assert result.returncode != 0
    assert words in result.stderr.splitlines()[-1]
    assert not (tmp_path / "results").exists()
