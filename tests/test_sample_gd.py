"""EqM/sample_gd.py as people run it."""

import argparse
import csv
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import distributed
from conftest import run_script, run_torchrun
from fast import conditioned_field
from models import EqM
from sample_gd import batches_of_rank, sample_batch
from sampling import sample_noise

STEPS = ["--num-sampling-steps", 3]


def sampled(checkpoint: Path, folder: Path, *flags: object, processes: int = 0) -> Path:
    arguments = ["sample_gd.py", "--ckpt", checkpoint, "--folder", "out", *STEPS, *flags]
    run = run_torchrun(processes, *arguments, cwd=folder) if processes else run_script(*arguments, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder / "out"


def read_video(path: Path) -> tuple[np.ndarray, av.video.stream.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream


def rows(folder: Path) -> list[dict]:
    with (folder / "samples.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def lively_checkpoint(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with larger output weights, so that the field moves samples a long way."""
    saved = torch.load(checkpoint, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    weight = saved["ema"]["final_layer.linear.weight"]
    saved["ema"]["final_layer.linear.weight"] = torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp("lively") / "lively.pt"
    torch.save(saved, path)
    return path


@pytest.fixture(scope="module")
def image_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, colour in (("red", (250, 10, 10)), ("blue", (10, 10, 250))):
        (folder / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(folder / "data" / name / "0.png")
    flags = ["--image-size", 16, "--model", "EqM-Ti/4", "--max-steps", 2, "--num-workers", 0]
    run = run_script("train.py", "--data-path", "data", *flags, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder / "results" / "000-EqM-Ti-4-Linear-velocity-None" / "checkpoints" / "0000002.pt"


def test_videos_are_h264_files_of_the_trained_length_and_rate(checkpoint, tmp_path):
    folder = sampled(checkpoint, tmp_path, "--num-fid-samples", 5, "--video", "--clip-len", 4, "--model", "EqM-Ti/4")
    assert sorted(path.name for path in folder.glob("*.mp4")) == [f"{i:06d}.mp4" for i in range(5)]
    frames, stream = read_video(folder / "000004.mp4")
    assert frames.shape == (4, 16, 16, 3)
    assert stream.codec_context.name == "h264"
    assert float(stream.average_rate) == pytest.approx(25 / 3, rel=1e-3)
    assert Image.open(tmp_path / "out-sheet.png").width > 256


def test_the_table_says_class_seed_and_settings_of_each_file(checkpoint, tmp_path):
    flags = ["--num-fid-samples", 3, "--class", "SquareUp", "--class", 0, "--global-seed", 7, "--target-fps", 5]
    folder = sampled(checkpoint, tmp_path, *flags, "--use-bf16", "--cfg-scale", 2)
    table = rows(folder)
    assert [row["file"] for row in table] == ["000000.mp4", "000001.mp4", "000002.mp4"]
    assert [row["class_name"] for row in table] == ["SquareUp", "CircleRight", "SquareUp"]
    assert [row["class"] for row in table] == ["3", "0", "3"]
    expected = {"seed": "7", "sampler": "ngd", "stepsize": "0.0017", "mu": "0.3", "steps": "3", "cfg_scale": "2.0"}
    assert expected.items() <= table[0].items()
    assert table[0]["precision"] == "fp32"
    assert float(read_video(folder / "000000.mp4")[1].average_rate) == 5


def test_a_fallback_is_said_once(checkpoint, tmp_path):
    run = run_script("sample_gd.py", "--ckpt", checkpoint, "--num-fid-samples", 1, *STEPS, "--use-amp", cwd=tmp_path)
    assert run.returncode == 0
    (line,) = [line for line in run.stdout.splitlines() if "precision:" in line]
    assert "WARNING precision: fp32 IEEE (fp16 requested: fp16 needs a CUDA GPU" in line


def test_gifs_have_every_frame(checkpoint, tmp_path):
    folder = sampled(checkpoint, tmp_path, "--num-fid-samples", 1, "--video-format", "gif")
    with Image.open(folder / "000000.gif") as image:
        assert image.n_frames == 4


@pytest.mark.parametrize(("flags", "processes"), [(["--global-batch-size", 1], 0), (["--global-batch-size", 4], 2)])
def test_videos_do_not_depend_on_batch_size_or_number_of_processes(lively_checkpoint, tmp_path, flags, processes):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    whole = sampled(lively_checkpoint, tmp_path / "one", "--num-fid-samples", 5, "--stepsize", 0.05)
    parts = sampled(
        lively_checkpoint, tmp_path / "other", "--num-fid-samples", 5, "--stepsize", 0.05, *flags, processes=processes
    )
    for i in range(5):
        expected, found = (read_video(folder / f"{i:06d}.mp4")[0].astype(int) for folder in (whole, parts))
        assert abs(expected - found).max() <= 2
    assert rows(whole) == rows(parts)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_a_sample_is_the_same_alone_and_in_a_batch_before_rounding(cfg_scale):
    torch.manual_seed(0)
    network = EqM((4, 8, 8), 4, 3, hidden_size=32, depth=2, num_heads=2, num_classes=3, temporal_patch=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.requires_grad_(False)
    args = argparse.Namespace(global_seed=3, cfg_scale=cfg_scale, stepsize=0.01, mu=0.3, sampler="ngd")
    classes = torch.tensor([0, 1, 2, 0])

    @torch.no_grad()
    def sample(indices: list[int]) -> torch.Tensor:
        conditioned = conditioned_field(network, len(indices), seconds_per_frame=0.12, fast=False)
        return sample_batch(args, network, conditioned, classes[indices], indices, range(50))

    together = sample([0, 1, 2, 3])
    for i in range(4):
        torch.testing.assert_close(sample([i]), together[i : i + 1], atol=1e-4, rtol=0)
    assert (together[0] - together[3]).abs().max() > 0.1


def test_as_many_updates_are_made_as_asked_for():
    class ConstantField(EqM):
        def field(self, x: torch.Tensor, *modulations: torch.Tensor, seconds_per_frame: float) -> torch.Tensor:
            return torch.ones_like(x)

    network = ConstantField(8, 4, 3, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    args = argparse.Namespace(global_seed=3, cfg_scale=1.0, stepsize=0.01, mu=0.3, sampler="ngd")
    conditioned = conditioned_field(network, 1, seconds_per_frame=0.1, fast=False)
    x = sample_batch(args, network, conditioned, torch.tensor([0]), [5], range(7))
    torch.testing.assert_close(x, sample_noise(3, [5], (3, 8, 8)) + 7 * 0.01)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_share_the_samples_in_batches_of_their_part(monkeypatch, ranks):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    done = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = batches_of_rank(num_samples=20, global_batch=6)
        assert max(map(len, batches)) <= 6 // ranks
        assert len(batches) == -(-sum(map(len, batches)) // (6 // ranks))
        done += [index for batch in batches for index in batch]
    assert sorted(done) == list(range(20))


def test_images_are_png_files_and_one_npz_beside_the_folder(image_checkpoint, tmp_path):
    folder = sampled(image_checkpoint, tmp_path, "--num-fid-samples", 3, "--class", "red")
    assert sorted(path.name for path in folder.iterdir()) == ["000000.png", "000001.png", "000002.png", "samples.csv"]
    images = np.load(tmp_path / "out.npz")["arr_0"]
    assert images.shape == (3, 16, 16, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images[1], np.asarray(Image.open(folder / "000001.png")))


def test_the_current_folder_can_take_the_samples(checkpoint, tmp_path):
    (tmp_path / "here").mkdir()
    flags = ["--ckpt", checkpoint, "--folder", ".", "--num-fid-samples", 1, *STEPS]
    run = run_script("sample_gd.py", *flags, cwd=tmp_path / "here")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "here" / "000000.mp4").exists()
    assert (tmp_path / "here-sheet.png").exists()


def test_samples_that_are_not_finite_are_an_error(lively_checkpoint, tmp_path):
    flags = ["--ckpt", lively_checkpoint, "--num-fid-samples", 1, "--stepsize", 1e38, *STEPS]
    run = run_script("sample_gd.py", *flags, cwd=tmp_path)
    assert run.returncode == 1
    assert "samples are not finite: lower --stepsize" in run.stderr
    assert "Traceback" not in run.stderr
