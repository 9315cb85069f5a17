"""`evaluate.py --neighbours`: the nearest real sample of each of the first samples."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import run_script
from drawing.pictures import read_png
from evaluation.neighbours import SAMPLES, find_nearest

CPU = torch.device("cpu")


def clips(seed: int, count: int, frames: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, frames, 8, 8), dtype=torch.uint8, generator=generator)


def batched(x: torch.Tensor, size: int) -> list[tuple[list[str], torch.Tensor]]:
    return [([str(i + k) for k in range(len(part))], part) for i, part in zip(range(0, 99, size), x.split(size))]  # noqa: B905


@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_copy_is_found_with_distance_zero_also_when_mirrored_in_any_batch(size):
    real = clips(0, 9, frames=2)
    samples = torch.stack([real[7], real[2].flip(-1), clips(1, 1, frames=2)[0]])
    found = find_nearest(["a", "b", "c"], samples, batched(real, size), CPU)
    copy, mirrored, other = found.neighbours
    assert (copy.nearest, copy.mirrored, copy.distance) == ("7", False, 0)
    assert (mirrored.nearest, mirrored.mirrored, mirrored.distance) == ("2", True, 0)
    assert other.distance > 0.5
    assert torch.equal(found.nearest[:2], samples[:2])


def test_the_distance_is_the_root_mean_square_of_all_pixels_between_minus_one_and_one():
    black, grey = torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8), torch.full((1, 3, 1, 8, 8), 51, dtype=torch.uint8)
    (found,) = find_nearest(["a"], black, [(["grey"], grey)], CPU).neighbours
    assert found.distance == pytest.approx(0.4)  # 51 of 255, on a scale of length 2
    half = black.clone()
    half[..., :4] = 51
    (found,) = find_nearest(["a"], black, [(["half"], half)], CPU).neighbours
    assert found.distance == pytest.approx(0.4 / 2**0.5)


def save(folder: Path, x: torch.Tensor, name: str = "") -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i, clip in enumerate(x):
        Image.fromarray(clip[:, 0].movedim(0, -1).numpy()).save(folder / name / f"{i:02d}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Thirty pictures to train on, five held out, and thirty samples, which begin with two copies."""
    folder = tmp_path_factory.mktemp("pictures")
    real = clips(0, 30)
    save(folder / "train", real[:15], "A")
    save(folder / "train", real[15:], "B")
    save(folder / "test", clips(1, 5), "A")
    save(folder / "samples", torch.cat([real[20:21], real[3:4].flip(-1), clips(2, 28)]))
    return folder


def test_one_flag_finds_copies_and_compares_with_held_out_pictures(pictures):
    flags = ["train", "samples", "--neighbours", "--held-out", "test"]
    run = run_script("evaluate.py", *flags, cwd=pictures)
    assert run.returncode == 0, run.stderr
    found = json.loads((pictures / "evaluation.json").read_text())["neighbours"]
    first, second, *others = found["generated"]["neighbours"]
    assert first == {"file": "00.png", "nearest": "B/05.png", "mirrored": False, "distance": 0}
    assert second == {"file": "01.png", "nearest": "A/03.png", "mirrored": True, "distance": 0}
    assert len(others) == SAMPLES - 2
    assert (found["generated"]["least"], found["held_out"]["samples"]) == (0, 5)
    assert found["held_out"]["least"] > 0.5
    assert found["nearer_than_held_out"] == sum(
        each["distance"] < found["held_out"]["least"] for each in found["generated"]["neighbours"]
    )
    lines = run.stdout.splitlines()
    assert any(line.startswith("distance to the nearest sample of REAL: root mean square") for line in lines)
    median = f"{found['held_out']['median']:.3f} ({found['held_out']['least']:.3f} to "
    assert any(line.startswith("held-out real") and median in line for line in lines)
    assert f"nearer than every held-out real one: {found['nearer_than_held_out']} generated samples" in lines
    # The first pair of the sheet: a sample, a line, and the same picture again; each pixel is magnified to 8×8.
    picture = read_png(pictures / "evaluation-neighbours.png")  # (H, W, 3)
    left, top = 8, 8 + 16
    one, two = (picture[top : top + 64 : 8, x : x + 64 : 8] for x in (left, left + 64 + 2))
    sample = np.asarray(Image.open(pictures / "samples" / "00.png"))
    assert np.array_equal(one, sample)
    assert np.array_equal(two, sample)


def test_without_held_out_pictures_and_with_an_unreadable_sample_the_next_ones_are_taken(pictures, tmp_path):
    shutil.copytree(pictures / "samples", tmp_path / "given")
    (tmp_path / "given" / "00.png").write_bytes(b"no picture")
    flags = ["--neighbours", "--output", "found.json"]
    run = run_script("evaluate.py", pictures / "train", "given", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "found.json").read_text())["neighbours"]
    assert found["generated"]["neighbours"][0]["file"] == "01.png"
    assert found["generated"]["samples"] == SAMPLES
    assert "held_out" not in found
    assert (tmp_path / "found-neighbours.png").exists()


def test_clips_are_compared_frame_by_frame_in_the_form_of_the_samples(shapes, tmp_path):
    run = run_script(
        "evaluate.py",
        *(shapes, shapes.parent / "test", "--neighbours", "--held-out", shapes.parent / "test"),
        *("--image-size", 16, "--clip-len", 4, "--frame-interval", 3),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())["neighbours"]
    assert found["generated"]["samples"] == found["held_out"]["samples"] == 4
    assert all(0 < each["distance"] < 1 for each in found["held_out"]["neighbours"])
    assert read_png(tmp_path / "evaluation-neighbours.png").shape[2] == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--held-out", "test"], "--held-out is for --neighbours: add it"),
        (["--neighbours", "--held-out", "nowhere"], "nowhere is not a folder: give one of images"),
        (["--neighbours", "--held-out", "clips.npz"], "--held-out clips.npz holds clips, and the other sides images"),
    ],
)
def test_what_cannot_be_compared_is_one_line(pictures, flags, said):
    np.savez(pictures / "clips.npz", np.zeros((3, 4, 8, 8, 3), np.uint8))
    run = run_script("evaluate.py", "train", "samples", *flags, cwd=pictures)
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if "error:" in line]
    assert said in line
    assert "Traceback" not in run.stderr
