"""Step sizes that are planned ahead, and those of other descents."""

import csv
import math
from pathlib import Path

import pytest
import torch

from conftest import SMALL, run_script
from objective import LEFT, SCHEDULES, Objective
from runtime import cli
from runtime.errors import UserError
from sampling.descent import Field, gradient_descent
from sampling.holding import Hold, held_levels
from sampling.method import MU, Method, add_method_args, check_method, method_of
from sampling.previews import add_preview_args, preview_method_of
from sampling.starts import StartRequest
from sampling.stepsizes import PLANNED_STEPS, plan_steps, shares_of_noise

PUBLISHED = Objective()
COUNTS = (1, 2, 3, 8, 16, 32, 64, 250)


def objective_of_schedule(schedule: str) -> Objective:
    return Objective(schedule=schedule, b=3.0 if schedule == "piecewise" else 1.0, scale=2.5)


def perfect_field(objective: Objective, clip: torch.Tensor, noise: torch.Tensor) -> Field:
    """The field of one clip and one noise on the line between them, in float64: c(γ)·(clip − noise)."""
    way = clip - noise

    def field(x: torch.Tensor) -> torch.Tensor:
        gamma = ((x - noise) * way).sum() / way.square().sum()
        return objective.c(gamma) * way

    return field


def descended(objective: Objective, planned, first: float = 1.0) -> list[float]:
    """The share of noise after each step of a descent along a perfect field."""
    generator = torch.Generator().manual_seed(0)
    clip, noise = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    field, shares = perfect_field(objective, clip, noise), []
    x = previous = (1 - first) * clip + first * noise
    for eta, ahead in zip(planned.sizes, planned.look_aheads, strict=True):
        previous, x = x, x + eta * field(x + ahead * (x - previous))
        shares.append((((clip - x) * (clip - noise)).sum() / (clip - noise).square().sum()).item())
    return shares


def method(*flags: object, objective: Objective = PUBLISHED, **about: object) -> Method:
    parser = cli.ArgumentParser("")
    add_method_args(parser)
    args = parser.parse_args([str(flag) for flag in flags])
    check_method(args)
    return method_of(args, objective, **about)


def away(x: torch.Tensor) -> torch.Tensor:
    return 2 - x.square()


def test_each_step_of_a_descent_takes_its_own_step_size_and_look_ahead():
    start, sizes, ahead = torch.randn(3, 4), (0.3, 0.1, 0.05), (0.0, 0.3, 0.4)
    right, previous = start, start
    for eta, mu in zip(sizes, ahead, strict=True):
        point = torch.add(right, right - previous, alpha=mu) if mu else right
        previous, right = right, torch.add(right, away(point), alpha=eta)
    assert torch.equal(gradient_descent(away, start, sizes, range(3), ahead), right)
    assert torch.equal(gradient_descent(away, start, sizes, range(9), ahead), right)
    constant = gradient_descent(away, start, (0.1,) * 3, range(3), 0.3)
    assert torch.equal(constant, gradient_descent(away, start, 0.1, range(3), 0.3))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("mu", [None, 0.0, 0.3, 0.95])
def test_a_perfect_field_is_descended_as_planned_until_no_noise_is_left(schedule, steps, mu):
    objective = objective_of_schedule(schedule)
    for first in (1.0, 0.4):
        planned = plan_steps(objective, steps, mu, first)
        assert len(planned.sizes) == len(planned.look_aheads) == steps == len(planned.shares) - 1
        assert planned.shares[0] == first
        assert planned.shares[-1] == 0 <= LEFT
        assert all(0 < size < math.inf for size in planned.sizes)
        assert all(0 <= ahead < 0.5 for ahead in planned.look_aheads)
        assert descended(objective, planned, first) == pytest.approx(planned.shares[1:], abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", COUNTS)
def test_no_step_goes_past_the_clip(schedule, steps):
    objective = objective_of_schedule(schedule)
    planned = plan_steps(objective, steps, 0.0)
    shares = torch.tensor(planned.shares[:-1], dtype=torch.float64)
    assert (torch.tensor(planned.sizes) * objective.c(1 - shares) / shares <= 1 + 1e-6).all()


def test_without_a_look_ahead_the_steps_are_those_of_plain_descent():
    planned, objective = plan_steps(Objective(), 16, 0.0), Objective()
    assert set(planned.look_aheads) == {0.0}
    assert shares_of_noise(objective, planned.sizes) == pytest.approx(planned.shares)


def test_the_share_of_noise_falls_by_step_size_times_magnitude_at_the_point_ahead():
    linear = Objective(schedule="linear", scale=2.0)
    shares = shares_of_noise(linear, [0.25, 0.1], first=0.5)
    assert shares == pytest.approx([0.5, 0.25, 0.25 - 0.1 * 2 * 0.25])
    shares = shares_of_noise(linear, [0.25, 0.1], mu=0.4, first=0.5)
    assert shares == pytest.approx([0.5, 0.25, 0.25 - 0.1 * 2 * (0.25 - 0.4 * 0.25)])
    assert shares_of_noise(Objective(schedule="constant"), [1.0]) == [1.0, 0.0]


def test_few_steps_are_planned_and_250_are_as_published():
    for steps in (250, PLANNED_STEPS + 1):
        assert method("--num-sampling-steps", steps).planned is None
    assert method() == Method()
    few = method("--num-sampling-steps", 16)
    assert few.planned == plan_steps(Objective(), 16)
    assert method("--num-sampling-steps", PLANNED_STEPS).planned
    assert method("--stepsize", "auto").planned == plan_steps(Objective(), 250)


def test_a_given_step_size_wins():
    given = method("--num-sampling-steps", 16, "--stepsize", 0.01)
    assert (given.planned, given.stepsize, given.mu) == (None, 0.01, MU)


def test_the_sampler_and_mu_choose_the_look_ahead_of_a_plan():
    few = ("--num-sampling-steps", 8)
    assert set(method(*few, "--sampler", "gd").planned.look_aheads) == {0.0}
    assert method(*few, "--mu", 0.2).planned == plan_steps(Objective(), 8, 0.2)
    assert method(*few, "--mu", 0.2).step_settings["mu"] == 0.2
    assert method(*few).step_settings["mu"] == "auto"


def test_what_has_no_plan_keeps_its_step_size():
    few = ("--num-sampling-steps", 8)
    for kept in (
        method(*few, "--sampler", "euler"),
        method(*few, "--adaptive", 0.5),
        method(*few, objective=Objective(path="VP")),
        method(*few, one_class=False),
    ):
        assert kept.planned is None


@pytest.mark.parametrize(
    ("flags", "about", "said"),
    [
        (("--sampler", "euler"), {}, "--sampler euler has no step size"),
        (("--adaptive", 0.5), {}, "--adaptive stops before the last"),
        ((), {"objective": Objective(path="GVP")}, "--path-type Linear alone.* GVP: give a number"),
        ((), {"one_class": False}, "--compose has a sum: give a number"),
    ],
)
def test_auto_is_refused_where_it_has_no_meaning(flags, about, said):
    with pytest.raises(UserError, match=said):
        method("--stepsize", "auto", *flags, **about)


def test_given_clips_are_descended_from_their_share_of_noise():
    assert StartRequest(0, 2).share == 1.0
    assert StartRequest(0, 2, Path("clips"), 0.3).share == 0.3
    planned = method("--num-sampling-steps", 8, first=0.3).planned
    assert planned.shares[0] == 0.3
    assert descended(Objective(), planned, 0.3) == pytest.approx(planned.shares[1:], abs=1e-9)


def test_previews_are_planned_in_the_same_way():
    parser = cli.ArgumentParser("")
    parser.add_argument("--no-uncond", dest="uncond", action="store_false")
    add_preview_args(parser)

    def previews(*flags: str, objective: Objective = PUBLISHED) -> Method:
        return preview_method_of(parser.parse_args(["--sample-every", "5", *flags]), objective)

    few = ("--sample-steps", "16")
    assert previews(*few) == method("--num-sampling-steps", 16)
    assert previews("--sample-stepsize", "auto") == method("--stepsize", "auto")
    assert previews(*few, "--no-uncond").planned is None
    with pytest.raises(UserError, match="--no-uncond has none of"):
        previews("--sample-stepsize", "auto", "--no-uncond")
    with pytest.raises(UserError, match="--path-type Linear alone"):
        previews("--sample-stepsize", "auto", objective=Objective(path="VP"))


def table(folder: Path) -> dict:
    with (folder / "samples.csv").open() as file:
        return next(csv.DictReader(file))


def test_log_and_table_say_what_was_planned_and_when_the_last_file_was_written(checkpoint, tmp_path):
    flags = ["--ckpt", checkpoint, "--folder", tmp_path / "s", "--num-fid-samples", 2, "--num-sampling-steps", 4]
    run = run_script("sample_gd.py", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    planned = plan_steps(Objective(), 4)
    text = f"auto: {planned.sizes[0]:.4g} to {planned.sizes[-1]:.4g}"
    assert f"step size: {text}, for 4 steps" in run.stdout
    assert (table(tmp_path / "s")["stepsize"], table(tmp_path / "s")["mu"]) == (text, "auto")
    assert table(tmp_path / "s")["evaluations"] == "4"
    first, *_, timed = [line for line in run.stdout.splitlines() if "sampling from" in line or "first line" in line]
    assert "INFO sampling from" in first
    assert float(timed.split(": ")[-1].removesuffix(" s")) > 0


def test_the_command_starts_a_plan_where_given_clips_stand(checkpoint, shapes, tmp_path):
    flags = ["--ckpt", checkpoint, "--folder", tmp_path / "s", "--num-fid-samples", 1, "--num-sampling-steps", 4]
    run = run_script("sample_gd.py", *flags, "--init", shapes, "--init-noise", 0.25, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert table(tmp_path / "s")["stepsize"] == f"auto: {plan_steps(Objective(), 4, first=0.25)}"


def test_the_command_refuses_a_plan_for_a_sum_and_keeps_its_step_size(checkpoint, tmp_path):
    flags = ["--ckpt", checkpoint, "--folder", tmp_path / "s", "--num-fid-samples", 1, "--num-sampling-steps", 2]
    run = run_script("sample_gd.py", *flags, "--compose", "0 + 1", "--stepsize", "auto", cwd=tmp_path)
    assert run.returncode == 1
    assert "error: --stepsize auto plans the field of one class, and --compose has a sum" in run.stderr
    assert run_script("sample_gd.py", *flags, "--compose", "0 + 1", cwd=tmp_path).returncode == 0
    assert float(table(tmp_path / "s")["stepsize"]) > 0


def test_a_plan_for_previews_is_refused_before_the_run_has_a_folder(shapes, tmp_path):
    flags = ["--num-workers", 0, "--path-type", "GVP", "--sample-every", 1, "--sample-stepsize", "auto"]
    run = run_script("train.py", "--data-path", shapes, *SMALL, *flags, cwd=tmp_path)
    assert run.returncode == 1
    assert "--path-type Linear alone" in run.stderr
    assert not list(tmp_path.glob("results/*"))


def test_what_is_held_has_the_level_of_the_rest_at_every_point_of_a_plan():
    clip, noise = torch.randn(2, 1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask, objective = torch.zeros(1, 4, 4, 4, dtype=torch.bool), Objective(schedule="linear")
    mask[:, :2] = True
    planned, seen = method("--num-sampling-steps", 8, objective=objective), []
    hold = Hold(mask, clip, noise, held_levels("Linear", planned.shares(objective), clean=False))
    sizes, ahead = planned.planned.sizes, planned.planned.look_aheads
    gradient_descent(
        lambda x: objective.scale * (clip - x), noise, sizes, range(8), ahead, lambda x, _: seen.append(x), hold
    )
    assert len(seen) == 8
    for point in seen:
        assert ((point - clip) / (noise - clip)).std() < 1e-3
    constant = Method(stepsize=0.01, mu=0.2, steps=5)
    assert constant.shares(objective) == shares_of_noise(objective, [0.01] * 5, 0.2)


def test_held_parts_start_from_noise():
    assert StartRequest(0, 2, Path("clips"), keep_frames=2).share == 1.0
