"""A network that puts out the clip: its field under each c(γ), with the noise level read off the clip itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clip_field import ClipOutput, noise_left
from conftest import SMALL, run_script
from models import EqM
from objective import Objective
from runs.config import config_of
from runtime.errors import UserError
from step import network_loss
from test_kept_flags import CONFIG
from test_train import assert_same, load

OBJECTIVES = {
    "linear": Objective(schedule="linear"),
    "truncated": Objective(),
    "piecewise": Objective(schedule="piecewise", a=0.6, b=2.5, scale=3.0),
}
ALL = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
READ_OFF = pytest.mark.parametrize("objective", [*OBJECTIVES.values()][1:], ids=[*OBJECTIVES][1:])


def new_network(objective: Objective, size: int | tuple[int, int, int]) -> EqM:
    torch.manual_seed(0)
    output = objective.clip_output
    gains = {"clip_gain": output.gain, "clip_a": output.a, "clip_b": output.b}
    return EqM(size, 8, 3, 32, 2, 2, 4, temporal_patch=1 if isinstance(size, int) else 2, **gains)


@ALL
@pytest.mark.parametrize("shape", [(9, 3, 64, 64), (9, 3, 4, 48, 48)], ids=str)
def test_a_perfect_clip_has_the_target_as_its_field(objective, shape):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)
    gamma = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.6, 0.75, 0.8, 0.9, 1.0])
    field = objective.clip_output.field(x, objective.interpolate(x, noise, gamma), temporal_patch=2)
    target = objective.target(x, noise, gamma)
    # Read off 12,288 or more numbers, the noise level is right to about 1%. It is not needed from a on.
    torch.testing.assert_close(field, target, rtol=0.04, atol=1e-5)
    exact = gamma > objective.a + 0.05
    torch.testing.assert_close(field[exact], target[exact], rtol=1e-4, atol=1e-5)


@READ_OFF
def test_each_temporal_patch_has_its_own_noise_level(objective):
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, 6, 64, 64)
    x, noise = torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)
    by_frame = torch.tensor([0.1, 0.1, 0.9, 0.9, 0.4, 0.4])
    gamma = by_frame.view(1, 1, 6, 1, 1)
    x_gamma, target = gamma * x + (1 - gamma) * noise, (x - noise) * objective.c(gamma)
    left = noise_left(x, x - x_gamma, 2, least=1e-3)  # (1, 1, 6, 1, 1)
    torch.testing.assert_close(left.flatten(), 1 - by_frame, rtol=0.03, atol=0)
    torch.testing.assert_close(objective.clip_output.field(x, x_gamma, 2), target, rtol=0.05, atol=1e-4)


@ALL
def test_the_field_rests_where_the_clip_is_x_and_its_gradient_there_is_finite(objective):
    x = torch.randn(2, 3, 4, 8, 8)
    clip = x.clone().requires_grad_()
    field = objective.clip_output.field(clip, x, 2)
    assert field.abs().max() == 0
    (gradient,) = torch.autograd.grad(field.sum(), clip)
    torch.testing.assert_close(gradient, (1 / objective.reach(torch.ones(()))).expand_as(x))


@ALL
def test_a_clip_of_16_bits_is_computed_with_in_float32(objective):
    clip, x = torch.randn(2, 2, 3, 4, 8, 8)
    of_half, of_whole = (objective.clip_output.field(each, x, 2) for each in (clip.half(), clip.half().float()))
    assert torch.equal(of_half, of_whole)


def test_a_gain_alone_means_the_linear_schedule_to_the_last_bit():
    clip, x = torch.randn(2, 2, 3, 4, 8, 8)
    assert torch.equal(ClipOutput(4.0).field(clip.bfloat16(), x, 2), 4.0 * (clip.bfloat16().float() - x))
    assert ClipOutput(4.0) == OBJECTIVES["linear"].clip_output
    torch.testing.assert_close(ClipOutput(4.0, a=1e-6).field(clip, x, 2), 4.0 * (clip - x), rtol=1e-4, atol=1e-4)


def expected_at_zero(objective: Objective, square: float) -> float:
    """The expected loss of x̂ = 0 for data of the mean square m and endless elements, by the mean over fine steps of γ.

    The field is −G·x_γ and the target g·(x − x_γ), with g = c/(1 − γ), and G the same at the noise level that x_γ
    shows, √(γ²m + (1 − γ)²).
    """
    gamma = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    shown = (gamma.square() * square + (1 - gamma).square()).sqrt()
    g, read = 1 / objective.reach(gamma), 1 / objective.reach((1 - shown).clamp(min=0))
    noise_part = (g - read).square() * shown.square()
    return (noise_part - 2 * g * (g - read) * gamma * square + g.square() * square).mean().item()


@ALL
@pytest.mark.parametrize("size", [32, (2, 32, 32)], ids=str)
def test_an_output_of_zero_has_the_expected_loss(objective, size):
    network, generator = new_network(objective, size), torch.Generator().manual_seed(1)
    x = torch.rand(256, *network.input_shape, generator=generator) * 2 - 1
    noise, gamma = torch.randn(x.shape, generator=generator), (torch.arange(256) + 0.5) / 256
    inputs = torch.zeros(256, dtype=torch.long), torch.ones(256)
    with torch.no_grad():
        loss = network_loss(network, objective, x, noise, gamma, *inputs).item()
    assert loss == pytest.approx(expected_at_zero(objective, x.square().mean().item()), rel=0.01)


def test_the_expected_loss_is_that_of_the_closed_form_where_there_is_one():
    assert expected_at_zero(OBJECTIVES["linear"], 0.7) == pytest.approx(16 * 0.7)
    # For dark data the noise level is read off without an error: λ²·m·(2/(1 − a) − 1).
    assert expected_at_zero(Objective(), 1e-9) == pytest.approx(16 * 1e-9 * (2 / 0.2 - 1), rel=1e-4)


@READ_OFF
def test_the_derivative_of_the_noise_level_counts(objective):
    """A longer x̂ − x is read as more noise, which makes the field shorter."""
    generator = torch.Generator().manual_seed(0)
    x, clip = torch.randn(1, 3, 16, 16, generator=generator), torch.rand(1, 3, 16, 16, generator=generator)
    away, output = 0.5 * (clip - x), objective.clip_output
    along = torch.tensor(1.0, requires_grad=True)
    (slope,) = torch.autograd.grad(output.field(x + along * away, x, 1).square().sum(), along)
    after, before = (output.field(x + (1 + step) * away, x, 1).square().sum() for step in (1e-2, -1e-2))
    torch.testing.assert_close(slope, (after - before) / 2e-2, rtol=1e-2, atol=1)


@READ_OFF
def test_the_field_is_one_graph_that_reads_nothing_back(objective):
    output = objective.clip_output
    clip, x = torch.randn(2, 2, 3, 4, 8, 8).unbind()
    results = []
    for function in (output.field, torch.compile(output.field, fullgraph=True, backend="aot_eager")):
        given = clip.clone().requires_grad_()
        field = function(given, x, 2)
        results.append((field, *torch.autograd.grad(field.square().sum(), given)))
    torch.testing.assert_close(*results)
    # Whatever reads a number of a tensor on the meta device raises.
    assert output.field(torch.empty_like(clip, device="meta", dtype=torch.bfloat16), x.to("meta"), 2).shape == x.shape


def test_a_config_whose_output_and_objective_differ_is_refused():
    clip = replace(CONFIG, network=replace(CONFIG.network, clip_gain=4.0, clip_a=0.8))
    assert config_of(clip.as_dict(), "a.pt") == clip
    for change in ({"clip_gain": 2.0}, {"clip_a": 0.0}, {"clip_b": 2.0}):
        wrong = clip.as_dict()
        wrong["network"] |= change
        with pytest.raises(UserError, match=r"a\.pt holds .*clip_gain, clip_a and clip_b are .* has another c"):
            config_of(wrong, "a.pt")


FLAGS = ["--num-workers", 0, "--global-batch-size", 4, "--log-every", 1, "--lr", 1e-3, "--model", "EqM-Ti/8"]
PIECEWISE = ["--predict", "clip", "--c-schedule", "piecewise", "--c-b", 2.5, "--c-a", 0.6]


def test_a_run_keeps_the_schedule_of_its_clip_goes_on_to_the_bit_and_samples(shapes: Path, tmp_path: Path):
    (tmp_path / "parts").mkdir()
    command = ["train.py", "--data-path", shapes, *SMALL, *FLAGS, *PIECEWISE]
    runs = [
        run_script(*command, "--max-steps", 4, cwd=tmp_path),
        run_script(*command, "--max-steps", 2, cwd=tmp_path / "parts"),
        run_script(*command[:4], "--num-workers", 0, "--resume", "--max-steps", 4, cwd=tmp_path / "parts"),
    ]
    assert [run.returncode for run in runs] == [0, 0, 0], [run.stderr for run in runs]
    (straight,), (went_on,) = (list((tmp_path / part / "results").iterdir()) for part in (".", "parts"))
    for name in ("model", "ema", "opt"):
        assert_same(load(went_on, 4)[name], load(straight, 4)[name])
    network = json.loads((went_on / "config.json").read_text())["network"]
    assert ClipOutput(network["clip_gain"], network["clip_a"], network["clip_b"]) == ClipOutput(4.0, 0.6, 2.5)
    arguments = ["--folder", tmp_path / "s", "--num-fid-samples", 2, "--num-sampling-steps", 2]
    sampled = run_script("sample_gd.py", "--ckpt", went_on / "checkpoints" / "0000004.pt", *arguments, cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert (tmp_path / "s" / "samples.csv").read_text().count("\n") == 3
