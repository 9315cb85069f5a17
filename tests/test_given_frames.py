"""Samples that hold the first frames, or a part of each frame, of given clips."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import run_script
from data.latent_space import LatentSpace
from data.latents import to_pixels, to_unit_range
from data.video import probe_video, read_frames
from drawing.pictures import read_png
from models import EqM
from objective import Objective
from runs.checkpoint import save_checkpoint
from runtime.errors import UserError
from runtime.random_numbers import sample_noise
from sampling.descent import gradient_descent
from sampling.holding import Hold, all_pixels, choose_kept, held_levels
from sampling.method import Method
from sampling.plan import Plan, PlanRequest, make_plan
from sampling.sampler import Sampler
from sampling.starts import StartRequest, Starts, choose_starts
from sampling.stepsizes import shares_of_noise
from test_sample_gd import image_checkpoint, lively_checkpoint, random_network, read_video, rows  # noqa: F401
from test_starts import CONFIG, NAMES

SHAPE = (3, 4, 16, 16)
TRAINED = replace(CONFIG, objective=Objective(by_frame=0.5))
PATCHED = replace(CONFIG, network=replace(CONFIG.network, temporal_patch=2))
STEPS = ["--num-sampling-steps", 3]


def sampled(checkpoint: Path, folder: Path, *flags: object):
    return run_script("sample_gd.py", "--ckpt", checkpoint, "--folder", "out", *STEPS, *flags, cwd=folder)


def starts_of(folder: Path, config=CONFIG, frames: int = 2, mask: Path | None = None) -> Starts:
    return choose_starts(StartRequest(5, 40, folder, 1.0, frames, mask), config, SHAPE, None)[0]


def clips_of(folder: Path) -> list[torch.Tensor]:
    """What the network sees of each clip, (C, T, H, W)."""
    paths = sorted(folder.glob("*/*.avi"))
    frames = [read_frames(path, probe_video(path), [0, 3, 6, 9], 16) for path in paths]
    return [to_unit_range(torch.from_numpy(each).permute(3, 0, 1, 2)) for each in frames]


def watched(config, shapes: Path, method: Method, **kept: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Two samples, of the files 5 and 0, and the points where the field was evaluated."""
    network = lively_network()
    plan = Plan([3], [], starts_of(shapes, config, **kept), (*NAMES, "no class"))
    sampler, points = Sampler(method, network, plan, 0.12, batch=2), []
    with torch.no_grad():
        start = sampler.starts([21, 0])
        x = sampler.descend_held([21, 0], start, range(method.steps), lambda point, value: points.append(point.clone()))
    return x, points


def lively_network() -> EqM:
    torch.manual_seed(0)
    network = EqM((4, 16, 16), 4, 3, 32, 2, 2, 3, temporal_patch=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.requires_grad_(False)


METHOD = Method(stepsize=0.05, mu=0.3, steps=6)


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, sampler="gd"), replace(METHOD, cfg_scale=2.0)])
@pytest.mark.parametrize("config", [CONFIG, TRAINED])
def test_the_given_frames_are_held_to_the_bit_and_the_others_are_made(shapes, method, config):
    x, points = watched(config, shapes, method)
    given = torch.stack([clips_of(shapes)[index] for index in (21 % 16, 0)])
    assert torch.equal(x[:, :, :2], given[:, :, :2])
    assert torch.equal(to_pixels(x[:, :, :2]), to_pixels(given[:, :, :2]))
    noise = sample_noise(5, [21, 0], SHAPE)
    assert torch.equal(points[0][:, :, 2:], noise[:, :, 2:]), "the rest starts from noise alone"
    assert (x[:, :, 2:] - noise[:, :, 2:]).abs().mean() > 0.1
    assert len(points) == 6


def test_a_network_trained_for_it_sees_clean_frames_from_the_start(shapes):
    given = clips_of(shapes)[5]
    for point in watched(TRAINED, shapes, METHOD)[1]:
        assert torch.equal(point[0, :, :2], given[:, :2])


def test_another_network_sees_the_given_frames_at_the_noise_that_the_rest_has_reached(shapes):
    given, noise = clips_of(shapes)[5][:, :2], sample_noise(5, [21], SHAPE)[0, :, :2]
    gamma, objective = 0.0, CONFIG.objective
    for point in watched(CONFIG, shapes, replace(METHOD, sampler="gd"))[1]:
        torch.testing.assert_close(point[0, :, :2], gamma * given + (1 - gamma) * noise, atol=1e-6, rtol=0)
        gamma = min(gamma + METHOD.stepsize * objective.c(torch.tensor(gamma)).item(), 1)
    assert gamma > 0.9


@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
def test_the_levels_go_from_noise_to_data_along_the_path_of_the_training(path):
    shares = shares_of_noise(Objective(path), [0.01] * 100)
    levels = held_levels(path, shares, clean=False)
    assert len(levels) == 101
    assert levels[0] == pytest.approx((0, 1), abs=0.01)
    assert levels[-1] == pytest.approx((1, 0), abs=0.1)
    assert held_levels(path, shares, clean=True) == [(1.0, 0.0)] * 101


def test_a_perfect_field_makes_the_rest_of_the_clip_as_fast_as_the_held_part_comes_out_of_the_noise():
    torch.manual_seed(0)
    clip, noise, objective = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 3, 4, 4, 4), Objective(schedule="linear")
    mask = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    hold, seen = Hold(mask, clip, noise, held_levels("Linear", shares_of_noise(objective, [0.1] * 20), clean=False)), []
    field = partial(lambda clip, x: objective.scale * (clip - x), clip)
    end = gradient_descent(field, noise, 0.1, range(20), watch=lambda point, _: seen.append(point), hold=hold)
    for point in seen:
        shares = ((point - clip) / (noise - clip)).flatten(1)
        assert shares.std() < 1e-3, "all of the clip has one level"
    torch.testing.assert_close(hold.end(end), clip, atol=1e-3, rtol=0)


def white_left_half(path: Path, size: tuple[int, int] = (16, 16), left: float = 0.5) -> Path:
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, : round(size[1] * left)] = 255
    Image.fromarray(pixels).save(path)
    return path


def test_the_white_part_of_a_mask_is_held_in_every_frame(shapes, tmp_path):
    mask = white_left_half(tmp_path / "mask.png", (64, 64))
    given = clips_of(shapes)[5]
    x, points = watched(TRAINED, shapes, METHOD, frames=0, mask=mask)
    assert torch.equal(x[0, ..., :8], given[..., :8])
    assert not torch.isclose(x[0, ..., 8:], given[..., 8:]).all()
    assert not torch.isclose(points[0][0, ..., :8], given[..., :8]).all(), "no frame had two levels in the training"
    both, _ = watched(CONFIG, shapes, METHOD, frames=2, mask=mask)
    assert torch.equal(both[0, :, :2], given[:, :2])
    assert torch.equal(both[0, ..., :8], given[..., :8])
    assert not torch.isclose(both[0, :, 2:, :, 8:], given[:, 2:, :, 8:]).all()


def test_a_position_of_latents_is_held_if_all_its_pixels_are(tmp_path):
    space = LatentSpace("", "", 1.0, 3, 4)
    white = torch.ones(16, 8, dtype=torch.bool)
    white[5, 2] = False
    assert torch.equal(all_pixels(white, space), torch.tensor([[1, 1], [0, 1], [1, 1], [1, 1]]).bool())

    network = replace(CONFIG.network, input_size=(4, 4, 4), temporal_patch=2)
    config = replace(CONFIG, network=network, space=replace(space, time_factor=2))  # 7 frames are 4 of latents
    assert choose_kept(3, None, config, (3, 4, 4, 4)).mask[0, :, 0, 0].tolist() == [True, True, False, False]
    with pytest.raises(UserError, match="--keep-frames 4: clips of 7 frames are cut into tokens .*of latents: give 3"):
        choose_kept(4, None, config, (3, 4, 4, 4))
    half = white_left_half(tmp_path / "mask.png", left=0.6)
    assert choose_kept(0, half, config, (3, 4, 4, 4)).mask[0, 0, 0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("frames", [1, 3, 4, 9])
def test_frames_that_are_no_whole_tokens_are_refused_with_those_that_are(frames):
    words = f"--keep-frames {frames}: clips of 4 frames are cut into tokens of 2 frames: give 2"
    with pytest.raises(UserError, match=words):
        choose_kept(frames, None, PATCHED, SHAPE)
    assert choose_kept(3, None, CONFIG, SHAPE).mask.sum() == 3 * 16 * 16


def test_the_command_holds_frames_in_any_batch_and_says_so(lively_checkpoint, shapes, tmp_path):  # noqa: F811
    common = ["--init", shapes, "--keep-frames", 2, "--class", "none", "--num-fid-samples", 3, "--stepsize", 0.05]
    run = sampled(lively_checkpoint, tmp_path, *common)
    assert run.returncode == 0, run.stderr
    assert "are held at the noise of the rest" in run.stdout
    table = rows(tmp_path / "out")
    assert [(row["keep_frames"], row["keep_mask"], row["class"], row["class_name"]) for row in table] == [
        ("2", "", "", "no class")
    ] * 3
    given = to_pixels(clips_of(shapes)[1]).permute(1, 2, 3, 0).numpy().astype(int)
    frames = read_video(tmp_path / "out" / "000001.mp4")[0].astype(int)
    assert abs(frames[:2] - given[:2]).mean() < 8, "but for the coding of the video"
    assert abs(frames[2:] - given[2:]).mean() > 20
    sheet = read_png(tmp_path / "out-sheet.png")
    (tmp_path / "one").mkdir()
    assert sampled(lively_checkpoint, tmp_path / "one", *common, "--global-batch-size", 1).returncode == 0
    assert abs(sheet.astype(int) - read_png(tmp_path / "one" / "out-sheet.png")).max() <= 1
    upper, lower = sheet[24:88, 8 : 8 + 2 * 66], sheet[90:154, 8 : 8 + 2 * 66]
    assert np.array_equal(upper, lower), "the sheet shows the given clip above, with the same first frames"
    assert not np.array_equal(sheet[24:88, 140:270], sheet[90:154, 140:270])


def test_a_checkpoint_trained_for_it_is_known_by_its_config(lively_checkpoint, shapes, tmp_path):  # noqa: F811
    saved = torch.load(lively_checkpoint, weights_only=True)
    saved["config"]["objective"]["by_frame"] = 0.5
    save_checkpoint(tmp_path / "trained.pt", saved)
    run = sampled(tmp_path / "trained.pt", tmp_path, "--init", shapes, "--keep-frames", 2, "--num-fid-samples", 1)
    assert run.returncode == 0, run.stderr
    assert "are held clean, as in the training with --gamma-per-frame" in run.stdout


def test_a_part_of_images_is_held(image_checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "given").mkdir()
    Image.new("RGB", (40, 20), (200, 100, 0)).save(tmp_path / "given" / "a.png")
    mask = white_left_half(tmp_path / "mask.png", (20, 20))
    flags = ["--init", "given", "--keep-mask", mask, "--num-fid-samples", 1, "--compose", "red + 0.5*blue"]
    run = sampled(image_checkpoint, tmp_path, *flags)
    assert run.returncode == 0, run.stderr
    image = np.asarray(Image.open(tmp_path / "out" / "000000.png"))
    assert (image[:, :8] == (200, 100, 0)).all()
    assert (image[:, 8:].reshape(-1, 3).std(0) > 20).all()
    assert rows(tmp_path / "out")[0]["keep_mask"] == str(mask)


def test_the_null_class_can_be_asked_for_unless_a_class_has_its_name():
    def classes(asked: str, config=CONFIG) -> list[int]:
        return make_plan(PlanRequest(StartRequest(0, 1), (asked,)), Method(), config, SHAPE, None).classes

    assert classes("none") == [3]
    assert classes("none", replace(CONFIG, classes=("A", "none", "B"))) == [1]
    with pytest.raises(UserError, match="--class nothing is unknown"):
        classes("nothing")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep-frames", 2], "--keep-frames says what is held of --init FOLDER: give that too"),
        (["--init", "x", "--keep-frames", 2, "--init-noise", 0.5], "--keep-frames has all that is not held start"),
        (
            ["--init", "x", "--keep-mask", "m", "--adaptive", 1],
            "--keep-mask needs gradient descent .*: leave out",
        ),
        (["--init", "x", "--keep-frames", 2, "--sampler", "euler"], "leave out --sampler euler"),
        (
            ["--init", "x", "--keep-frames", 4],
            "--keep-frames 4: clips of 4 frames are cut into tokens of 2 frames",
        ),
        (["--init", "x", "--keep-mask", "missing.png"], "--keep-mask missing.png cannot be read: No such file"),
        (["--init", "x", "--keep-mask", "text.png"], "--keep-mask text.png cannot be read: cannot identify"),
        (["--init", "x", "--keep-mask", "black.png"], "--keep-mask black.png holds nothing"),
        (["--init", "x", "--keep-mask", "white.png"], "--keep-mask white.png holds everything"),
    ],
)
def test_what_cannot_be_held_is_refused_in_one_line(flags, words, checkpoint, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    white_left_half(tmp_path / "black.png", left=0)
    white_left_half(tmp_path / "white.png", left=1)
    run = sampled(checkpoint, tmp_path, *flags)
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if "error" in line]
    assert re.search(words, line), line


def test_images_have_no_first_frames(image_checkpoint, tmp_path):  # noqa: F811
    run = sampled(image_checkpoint, tmp_path, "--init", "x", "--keep-frames", 2)
    assert "--keep-frames holds frames of clips, and the checkpoint makes images: leave it out" in run.stderr
