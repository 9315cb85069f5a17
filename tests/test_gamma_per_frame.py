"""Training in which each frame of a clip has its own noise level, and some clips begin with clean frames."""

from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from conftest import SMALL, run_script
from models import EqM
from objective import SCHEDULES, Objective
from runs.config import Config, config_of
from runs.load_network import read_stored
from step import BEGUN_SHARE, draw_frame_levels, network_loss
from test_kept_flags import CONFIG
from test_train import metrics
from test_training import RECIPE, new_state, one_step

GAMMAS = torch.tensor([[0.0, 0.3, 0.9, 1.0], [1.0, 1.0, 0.5, 0.85]])


def levels(share: float, samples: int = 20_000, frames: int = 8, patch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """γ of samples, and of their frames."""
    generator = torch.Generator().manual_seed(0)
    gamma = torch.rand(samples, generator=generator)
    return gamma, draw_frame_levels(gamma, frames, patch, share, generator)


def test_frames_have_levels_of_their_own_in_the_share_that_was_asked_for():
    gamma, found = levels(0.3)
    own = (found != gamma[:, None]).any(1)
    assert own.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(found[:, ::2], found[:, 1::2]), "the frames of a token have one level"
    clean = found[own][:, ::2] == 1  # (n, 4)
    begun = clean.any(1)
    assert begun.float().mean().item() == pytest.approx(BEGUN_SHARE, abs=0.02)
    lengths = clean[begun].sum(1)
    assert torch.equal(clean[begun], torch.arange(4) < lengths[:, None]), "only the first frames are clean"
    assert torch.bincount(lengths, minlength=5).tolist() == pytest.approx([0, *[len(lengths) / 3] * 3, 0], rel=0.1), (
        "at least one time is clean, and not all"
    )
    free = found[own][~begun][:, ::2]
    assert free.mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.02)
    assert abs(torch.corrcoef(free.T) - torch.eye(4)).max() < 0.05, "levels of two times have nothing in common"


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "constant"])
@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_each_frame_has_the_input_and_the_target_of_its_own_level(path, schedule):
    objective = Objective(path, schedule, b=2.0)
    x, noise = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    mixed, target = objective.interpolate(x, noise, GAMMAS), objective.target(x, noise, GAMMAS)
    for frame in range(4):
        one = x[:, :, frame], noise[:, :, frame], GAMMAS[:, frame]
        assert torch.equal(mixed[:, :, frame], objective.interpolate(*one))
        assert torch.equal(target[:, :, frame], objective.target(*one))
    assert (target[1, :, :2] == 0).all(), "a clean frame stays where it is"
    torch.testing.assert_close(mixed[1, :, :2], x[1, :, :2])
    assert (target[0, :, :3] != 0).any()


def test_an_output_of_zero_has_a_loss_without_the_clean_frames():
    torch.manual_seed(0)
    network, objective = EqM((8, 8, 8), 8, 3, 32, 2, 2, 4, temporal_patch=2), Objective(schedule="linear")
    x, noise = torch.randn(4096, 3, 8, 8, 8), torch.randn(4096, 3, 8, 8, 8)
    labels = torch.zeros(4096, dtype=torch.long), torch.full((4096,), 0.1)
    plain, by_frame = (
        network_loss(network, objective, x, noise, levels(share, 4096)[1], *labels).item() for share in (0.0, 1.0)
    )
    assert plain == pytest.approx(16 / 3 * 2, rel=0.05)
    # Half of the clips begin with clean frames, and half of the frames of these, on average, are clean.
    assert by_frame / plain == pytest.approx(1 - BEGUN_SHARE / 2, rel=0.05)


def train(data: Path, folder: Path, *flags: object) -> CompletedProcess:
    common = ["--data-path", data, *SMALL, "--num-workers", 0, "--log-every", 1, "--max-steps", 2]
    return run_script("train.py", *common, *flags, cwd=folder)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(next(folder.glob("results/*")))]


def test_other_random_numbers_stay_as_they_are_without_it():
    """A share that no sample falls into draws more numbers, and must change none of the others."""

    def losses_with(share: float) -> list[float]:
        state, recipe = new_state(), replace(RECIPE, objective=Objective(by_frame=share), micro_batch=4)
        return [one_step(state, recipe, 8 * step)[1] for step in range(3)]

    plain, unused, half = map(losses_with, (0.0, 1e-30, 0.5))
    assert plain == unused
    assert plain[0] != half[0]


@pytest.mark.parametrize("flags", [["--predict", "clip"], ["--ebm", "dot"], ["--path-type", "GVP", "--disp"]])
def test_it_goes_together_with_other_outputs_energies_and_paths(shapes, tmp_path, flags):
    plain = ["--gamma-per-frame", 0.5, "--global-batch-size", 4, "--micro-batch-size", 2]
    result = train(shapes, tmp_path, *plain, *flags)
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path)) == 2


def test_a_run_keeps_it_and_goes_on_with_it(shapes, tmp_path):
    assert train(shapes, tmp_path, "--gamma-per-frame", 0.5).returncode == 0
    result = train(shapes, tmp_path, "--resume", "--max-steps", 3)
    assert result.returncode == 0, result.stderr
    (checkpoint,) = tmp_path.glob("results/000*/checkpoints/0000003.pt")
    assert read_stored(checkpoint)[1].objective.by_frame == 0.5


def test_a_checkpoint_that_says_nothing_of_it_was_trained_without():
    old = CONFIG.as_dict()
    del old["objective"]["by_frame"]
    config: Config = config_of(old, "old.pt")
    assert config.objective.by_frame == config.kept_flags()["gamma_per_frame"] == 0


def test_images_have_no_frames_to_give_levels_to(shapes, tmp_path):
    result = run_script("train.py", "--data-path", shapes, "--gamma-per-frame", 0.5, cwd=tmp_path)
    assert "--gamma-per-frame does not work with images: add --video" in result.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-uncond"], "--gamma-per-frame does not work with --no-uncond, whose network sees one γ"),
        (["--path-type", "VP"], "does not work with --path-type VP"),
        (["--c-schedule", "constant"], "does not work with --c-schedule constant"),
        (["--temporal-patch", 4], "needs two tokens in time, and 4 frames in patches of 4 are one: raise --clip-len"),
        (["--gamma-per-frame", 1.1], "'1.1' is not a number from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, words, shapes, tmp_path):
    result = train(shapes, tmp_path, "--gamma-per-frame", 0.5, *flags)
    assert result.returncode in (1, 2)
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert words in line
    assert not list(tmp_path.glob("results/*"))
