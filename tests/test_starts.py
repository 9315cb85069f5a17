"""Samples that start from given clips or images."""

import csv
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import run_script
from data.latent_space import LatentSpace
from data.latents import encode, to_unit_range
from data.video import iterate_frames, probe_video, read_frames, write_video
from drawing.pictures import CAPTION_HEIGHT, MARGIN, read_png
from network_settings import NetworkSettings
from runs.checkpoint import save_checkpoint
from runs.config import Config
from runtime.errors import UserError
from runtime.random_numbers import sample_noise
from sampling.descent import gradient_descent
from sampling.starts import INIT_NOISE, StartRequest, Starts, choose_starts

SHAPE = (3, 4, 16, 16)
NAMES = ("CircleRight", "CircleUp", "SquareRight")  # SquareUp is not known
NETWORK = NetworkSettings("EqM-Ti/4", (4, 16, 16), 3, len(NAMES))
CONFIG = Config(NETWORK, NAMES, 25 / 3, {"name": "fp32"}, flags={"frame_interval": 3})


def starts_of(folder: Path | None, noise: float = INIT_NOISE, samples: int = 40) -> tuple[Starts, list[int]]:
    return choose_starts(StartRequest(5, samples, folder, noise), CONFIG, SHAPE, None)


def test_only_noise_is_the_ordinary_start_to_the_bit(shapes):
    starts, _ = starts_of(shapes, noise=1.0)
    ordinary, classes = starts_of(None)
    assert classes == []
    assert torch.equal(starts([0, 7, 19]), ordinary([0, 7, 19]))
    assert torch.equal(ordinary([7]), sample_noise(5, [7], SHAPE))


@pytest.mark.parametrize("noise", [0.25, 0.001])
def test_a_start_is_the_file_in_turn_and_noise_of_its_own_in_their_shares(shapes, noise):
    starts, _ = starts_of(shapes, noise)
    clips = sorted(shapes.glob("*/*.avi"))
    assert len(clips) == 16
    for index in (0, 5, 16 + 5):
        frames = read_frames(clips[index % 16], probe_video(clips[index % 16]), [0, 3, 6, 9], 16)
        x = to_unit_range(torch.from_numpy(frames).permute(3, 0, 1, 2))
        expected = (1 - noise) * x + noise * sample_noise(5, [index], SHAPE)[0]
        torch.testing.assert_close(starts([index, 3])[0], expected, rtol=0, atol=1e-6)
    end = gradient_descent(torch.zeros_like, starts([5, 21]), 0.1, range(9))
    assert torch.equal(end, starts([5, 21]))
    torch.testing.assert_close(end[0] - end[1], noise * (sample_noise(5, [5], SHAPE) - sample_noise(5, [21], SHAPE))[0])


def test_a_file_has_the_class_of_its_folder_where_the_checkpoint_knows_it(shapes, tmp_path):
    assert starts_of(shapes)[1] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4  # 3 is the null class
    shutil.copy(min(shapes.glob("*/*.avi")), tmp_path / "a.avi")
    assert starts_of(tmp_path)[1] == [3]


def test_only_as_many_files_as_samples_are_opened_and_unreadable_ones_are_left_out(shapes, tmp_path):
    clips = sorted(shapes.glob("CircleUp/*.avi"))
    for name, clip in zip("acd", clips, strict=False):
        shutil.copy(clip, tmp_path / f"{name}.avi")
    (tmp_path / "b.avi").write_text("no video")
    found = {
        samples: [Path(item.path).stem for item in starts_of(tmp_path, samples=samples)[0].items]
        for samples in (1, 2, 9)
    }
    assert found == {1: ["a"], 2: ["a", "c"], 9: ["a", "c", "d"]}


def test_a_short_clip_holds_its_last_frame(tmp_path):
    write_video(tmp_path / "short.mp4", np.stack([np.full((16, 16, 3), 60 * i, np.uint8) for i in range(5)]), 25)
    start = starts_of(tmp_path, noise=1e-6)[0]([0])
    levels = (start.mean((0, 1, 3, 4)) + 1) * 127.5
    assert levels.tolist() == pytest.approx([0, 180, 240, 240], abs=4)


def test_a_file_that_has_gone_since_is_named(shapes, tmp_path):
    shutil.copy(min(shapes.glob("*/*.avi")), tmp_path / "a.avi")
    starts, _ = starts_of(tmp_path)
    (tmp_path / "a.avi").unlink()
    with pytest.raises(UserError, match=r"--init: .*a\.avi cannot be read"):
        starts([0])


def test_latents_start_from_the_means_shifted_and_scaled():
    def moments(x: torch.Tensor) -> torch.Tensor:
        means = x[..., ::2, ::2]  # (N, 3, [T,] h, w)
        return torch.stack([means, torch.full_like(means, 9.0)], dim=1)

    vae = SimpleNamespace(moments=moments, space=LatentSpace("", "", 0.5, 3, 2, means=(1.0, 1.0, 1.0)))
    clips = torch.randint(0, 256, (2, 3, 4, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(encode(clips, vae), 0.5 * (to_unit_range(clips[..., ::2, ::2]) - 1))
    torch.testing.assert_close(encode(clips[:, :, 0], vae), 0.5 * (to_unit_range(clips[:, :, 0, ::2, ::2]) - 1))


@pytest.fixture(scope="module")
def still_checkpoint(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with a field of zero, under which samples stay where they start."""
    saved = torch.load(checkpoint, weights_only=True)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        saved["ema"][name].zero_()
    path = tmp_path_factory.mktemp("still") / "still.pt"
    save_checkpoint(path, saved)
    return path


def test_the_sampler_varies_the_clips_of_a_folder(still_checkpoint, shapes, tmp_path):
    flags = ["--init", shapes, "--init-noise", 0.02, "--num-fid-samples", 18, "--num-sampling-steps", 2]
    run = run_script("sample_gd.py", "--ckpt", still_checkpoint, "--folder", "out", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    with (tmp_path / "out" / "samples.csv").open() as file:
        table = list(csv.DictReader(file))
    clips = sorted(shapes.glob("*/*.avi"))
    assert [Path(row["init"]) for row in table] == [*clips, *clips[:2]]
    assert [row["class_name"] for row in table] == [Path(row["init"]).parent.name for row in table]
    assert {row["init_noise"] for row in table} == {"0.02"}
    given = [read_frames(clip, probe_video(clip), [0, 3, 6, 9], 16).astype(int) for clip in clips]
    for index in range(18):
        path = tmp_path / "out" / f"{index:06d}.mp4"
        sample = np.stack(list(iterate_frames(path, probe_video(path), 16)))
        distances = [abs(sample - clip).mean() for clip in given]
        assert np.argmin(distances) == index % 16
        assert min(distances) < 12
    strips = strips_of(read_png(tmp_path / "out-sheet.png").astype(int), 36)
    for before, sample in zip(strips[::2], strips[1::2], strict=True):
        assert 0 < abs(before - sample).mean() < 12, "a sample stands behind what it starts from"


def strips_of(sheet: np.ndarray, number: int) -> list[np.ndarray]:
    """The strips of a contact sheet, (H, W, 3) each, of four frames of 64 pixels and two between."""
    height, width = 64 + MARGIN + CAPTION_HEIGHT, 4 * 66 + MARGIN
    columns = sheet.shape[1] // width
    corners = [(MARGIN + CAPTION_HEIGHT + i // columns * height, MARGIN + i % columns * width) for i in range(number)]
    return [sheet[top : top + 64, left : left + 4 * 66] for top, left in corners]


@pytest.mark.slow
def test_the_sampler_varies_images_without_a_class_and_adds_fields_of_classes(tmp_path):
    for name, colour in (("red", (250, 10, 10)), ("blue", (10, 10, 250))):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "data" / name / "0.png")
    run_here = partial(run_script, cwd=tmp_path)
    small = ["--image-size", 16, "--model", "EqM-Ti/4", "--max-steps", 1, "--num-workers", 0]
    assert run_here("train.py", "--data-path", "data", *small).returncode == 0
    (path,) = tmp_path.glob("results/*/checkpoints/*.pt")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (40, 20), (200, 100, 0)).save(tmp_path / "flat" / "a.png")
    few = ["--ckpt", path, "--num-fid-samples", 2, "--num-sampling-steps", 1, "--stepsize", 1e-6]
    run = run_here("sample_gd.py", *few, "--init", "flat", "--init-noise", 0.01, "--folder", "varied")
    assert run.returncode == 0, run.stderr
    assert np.asarray(Image.open(tmp_path / "varied" / "000001.png")).mean((0, 1)) == pytest.approx(
        [200, 100, 0], abs=5
    )
    first = (tmp_path / "varied" / "samples.csv").read_text().splitlines()[1]
    assert first.startswith("000000.png,0,,no class,flat/a.png,")

    flags = ["--compose", "red - 0.5*1", "--cfg-scale", 2, "--cfg-channels", 3, "--folder", "summed"]
    run = run_here("sample_gd.py", *few, *flags)
    assert run.returncode == 0, run.stderr
    first = (tmp_path / "summed" / "samples.csv").read_text().splitlines()[1]
    assert first.startswith("000000.png,0,,red - 0.5*1,,")
