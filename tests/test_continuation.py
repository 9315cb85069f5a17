"""Measures of videos over time, on shapes whose answers are known, and EqM/evaluate_video.py as people run it."""

import colorsys
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import evaluate_video
from conftest import ROOT, run_command, run_script
from data.video import probe_video, read_frames, write_video
from evaluation import judge
from evaluation.constancy import constancy_rows
from evaluation.continuation import Continued, Nearest, class_of, continuation_rows, others
from evaluation.foreground import centroids, foreground, hues, psnr, same_hue, same_motion
from evaluation.judge import Judged
from make_moving_shapes import render_clip
from runtime.errors import UserError

GIVEN, FRAMES, SIDE = 4, 10, 32
NAMES = [shape + direction for shape in ("Circle", "Square") for direction in ("Right", "Left", "Down", "Up")]


def rendered(name: str, seed: int, frames: int = FRAMES) -> Tensor:
    """A clip (3, T, H, W) uint8 of a class such as CircleUp."""
    place = next(i for i in range(1, len(name)) if name[i].isupper())
    rng = np.random.default_rng(seed)
    clip = render_clip(name[:place].lower(), name[place:].lower(), SIDE, frames, rng)
    return torch.from_numpy(clip).permute(3, 0, 1, 2)


def all_rendered(first_seed: int, each: int = 2) -> tuple[Tensor, list[str]]:
    """Clips (N, 3, T, H, W) of all classes, in turn, and their classes."""
    names = NAMES * each
    return torch.stack([rendered(name, first_seed + i) for i, name in enumerate(names)]), names


class Oracle:
    """A judge that knows the shapes of given clips by how much of their bounding box they fill."""

    def words_seen(self, x: Tensor) -> dict[str, np.ndarray]:
        words = []
        for mask in foreground(x)[:, -1].numpy() > 100:  # (H, W)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) if len(rows) else 1
            words.append("Square" if mask.sum() / box > 0.9 else "Circle")
        return {"shape": np.array(words), "direction": np.full(len(x), "Up")}

    def judge(self, x: Tensor, classes: list[str]) -> Judged:
        seen = self.words_seen(x)["shape"]
        return Judged({"shape": seen == np.array([name[:6] for name in classes]), "direction": np.zeros(len(x), bool)})


def shares(row: dict) -> dict[str, float]:
    return {part: found["share"] for part, found in row["shares"].items()}


def test_the_centroid_and_the_hue_are_those_that_were_drawn():
    clip = torch.full((2, 3, 2, 20, 30), 24, dtype=torch.uint8)
    for i, hue in enumerate((0.1, 0.9)):
        colour = torch.tensor([round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 0.9)]).byte()
        clip[i, :, 0, 4:8, 10:14] = colour[:, None, None]
        clip[i, :, 1, 5:9, 12:16] = colour[:, None, None]
    assert centroids(clip).tolist() == [[[12, 6], [14, 7]]] * 2
    assert hues(clip).tolist() == pytest.approx([36, -36], abs=1.2)
    assert same_hue(hues(clip), torch.tensor([50.0, -360 - 30.0])).tolist() == [True, True]
    assert same_hue(hues(clip), torch.tensor([53.0, 33.0])).tolist() == [False, False]


def test_hues_are_compared_around_the_circle():
    assert same_hue(torch.tensor([179.0, -179.0]), torch.tensor([-170.0, 160.0])).tolist() == [True, False]


def test_what_is_not_there_has_no_hue_and_no_motion_and_is_never_right():
    clip = torch.full((1, 3, 4, 16, 16), 200, dtype=torch.uint8)
    clip[:, :, :2, 4:8, 4:8] = torch.tensor([250, 0, 0]).byte()[:, None, None, None]  # it vanishes after two frames
    assert hues(clip).isnan().all()
    assert centroids(clip).isnan().any()
    assert not same_hue(hues(clip), hues(clip)).any()
    assert not same_motion(centroids(clip), centroids(clip)).any()
    assert hues(clip[:, :, :2]).tolist() == pytest.approx([0], abs=0.1)
    speck = torch.zeros(1, 3, 2, 64, 64, dtype=torch.uint8)
    speck[:, 0, :, :2, :2] = 255
    assert hues(speck).isnan().all()


def test_motion_is_compared_frame_by_frame():
    t = torch.arange(8.0)
    right, up = torch.stack([t, 0 * t], 1), torch.stack([0 * t, -t], 1)
    there_and_back = torch.stack([3.5 - (t - 3.5).abs(), 0 * t], 1)
    paths = torch.stack([right, right, right, right, there_and_back, there_and_back])
    asked = torch.stack([3 * right + 5, up, -right, 0 * right, there_and_back, right])
    assert same_motion(paths, asked).tolist() == [True, False, False, False, True, False]


def test_psnr_is_that_of_the_mean_squared_error_and_bounded():
    x = torch.full((2, 3, 2, 4, 4), 100, dtype=torch.uint8)
    y = x.clone()
    y[1] += 5
    assert psnr(x, y).tolist() == pytest.approx([10 * np.log10(255**2 * 12), 20 * np.log10(255 / 5)], abs=1e-3)


def test_the_others_are_all_and_no_sample_is_its_own_other():
    for count in (2, 3, 17):
        places = others(count, seed=0)
        assert sorted(places) == list(range(count))
        assert (places != np.arange(count)).all()


def test_the_nearest_training_clip_is_found_across_batches():
    clips, _ = all_rendered(0)
    training = torch.cat([clips[5:], clips[:5]])
    nearest = Nearest(clips[:, :, :GIVEN])
    for first in range(0, 16, 6):
        places = list(range(first, min(first + 6, 16)))
        nearest.see(places, training[places][:, :, :GIVEN])
    assert torch.equal(nearest.clips(lambda place: (training[place], 0.0)), clips)


def test_the_real_continuation_is_right_and_baselines_and_controls_are_not():
    truths, classes = all_rendered(0)
    training, _ = all_rendered(100)
    rows = continuation_rows(Continued(truths, truths, classes, GIVEN), training, Oracle(), seed=0)
    assert set(shares(rows["samples"]).values()) == {1.0}
    assert rows["samples"] == rows["what really follows"]
    assert rows["samples"]["psnr"] == pytest.approx(58.9, abs=0.1)
    held = shares(rows["last given frame held"])
    assert held["direction"] == 0
    assert held["shape"] == held["colour"] == 1
    assert shares(rows["nearest training clip"])["colour"] < 0.5
    control = shares(rows["samples, against other clips"])
    assert control["all three"] <= 0.1
    assert control["direction"] < 0.6
    assert control["colour"] < 0.4
    assert rows["samples, against other clips"]["psnr"] < rows["last given frame held"]["psnr"] < 40
    assert rows["samples"]["shares"]["colour"]["samples"] == 16


def test_only_the_frames_that_follow_count():
    truths, classes = all_rendered(0)
    samples, spoiled = truths.clone(), truths.clone()
    samples[:, :, :GIVEN] = 0
    spoiled[:, :, GIVEN:] = spoiled[:, :, GIVEN:].flip(2)
    right, wrong = (
        continuation_rows(Continued(clips, truths, classes, GIVEN), truths, Oracle(), seed=0)["samples"]
        for clips in (samples, spoiled)
    )
    assert shares(right)["all three"] == 1
    assert shares(wrong)["direction"] == 0
    assert shares(wrong)["colour"] == shares(wrong)["shape"] == 1


def test_what_stays_in_a_video_and_what_changes():
    clips, _ = all_rendered(0)
    first, last = clips[:, :, :3], clips[:, :, -3:].clone()
    last[0] = last[0].flip(0)  # another colour
    last[1] = rendered("SquareUp", 1)[:, -3:]  # another shape of the same colour
    colours = torch.stack([hues(first), hues(last)])
    rows = constancy_rows(torch.stack([first, last]), colours, Oracle(), seed=0)
    assert shares(rows["samples"]) == pytest.approx({"shape": 15 / 16, "colour": 15 / 16, "both": 14 / 16})
    assert shares(rows["last frames of other videos"])["both"] < 0.3


@pytest.mark.parametrize("path", ["held/CircleUp/x.avi", "flat/v_CircleUp_g01_c02.avi"])
def test_the_class_of_a_source_is_that_of_its_folder_or_of_its_name(path):
    assert class_of(Path(path), NAMES) == "CircleUp"
    with pytest.raises(UserError, match="shows no class of REAL"):
        class_of(Path(path), ["SquareUp"])


@pytest.fixture(scope="module")
def shapes_of_two(tmp_path_factory) -> Path:
    """Circles and squares that move right and left: 16 clips each to train on and 3 held out, of 10 frames."""
    folder = tmp_path_factory.mktemp("two")
    options = "--shapes circle square --directions right left --train-clips 16 --test-clips 3 --size 16 --frames 10"
    script = ROOT / "datasets" / "make_moving_shapes.py"
    result = run_command(sys.executable, script, folder, *options.split(), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def continued(sources: Path, folder: Path, order: int = 1) -> Path:
    """A folder as EqM/sample_gd.py leaves it, of samples that are their sources; with -1 each has another's."""
    folder.mkdir(parents=True)
    paths, rows = sorted(sources.glob("*/*.avi")), ["file,index,class,class_name,init"]
    for i, path in enumerate(paths):
        write_video(folder / f"{i:06d}.mp4", read_frames(path, probe_video(path), range(10), 16), 25.0)
        rows.append(f"{i:06d}.mp4,{i},,no class,{paths[::order][i]}")
    (folder / "samples.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[dict, str]]:
    """Runs the command here, with a judge that learns for a few steps only."""

    def run(*arguments: object) -> tuple[dict, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(judge, "STEPS", 60)
        monkeypatch.setattr(sys, "argv", ["evaluate_video.py", *map(str, arguments)])
        evaluate_video.main()
        return json.loads((tmp_path / "video-evaluation.json").read_text()), capsys.readouterr().out

    return run


def refused(folder: Path, *arguments: object) -> str:
    result = run_script("evaluate_video.py", *arguments, cwd=folder)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.split("\n") if "error:" in line]
    return line


@pytest.mark.slow
def test_the_command_finds_real_continuations_right_and_those_of_other_clips_wrong(shapes_of_two, tmp_path, measured):
    train, test = shapes_of_two / "train", shapes_of_two / "test"
    report, printed = measured(train, continued(test, tmp_path / "right"), "--given", 4)
    found = shares(report["rows"]["samples"])
    assert found["direction"] == found["colour"] == 1
    # H.264 is all that lies between the two.
    assert found["shape"] == pytest.approx(shares(report["rows"]["what really follows"])["shape"], abs=0.2)
    assert report["given_psnr"] > 30
    assert shares(report["rows"]["last given frame held"])["direction"] == 0
    assert "4 given frames, 6 follow, of 16×16 pixels: 12 samples" in printed
    assert "100.0% (12 of 12)" in printed
    report, _ = measured(train, continued(test, tmp_path / "wrong", -1), "--given", 4)
    assert shares(report["rows"]["samples"])["direction"] == 0
    assert shares(report["rows"]["samples"])["all three"] == 0
    assert report["given_psnr"] < 20


@pytest.mark.slow
def test_the_command_compares_the_ends_of_videos(shapes_of_two, tmp_path, measured):
    samples = continued(shapes_of_two / "test", tmp_path / "samples")
    report, printed = measured(shapes_of_two / "train", samples, "--ends", 5)
    assert shares(report["rows"]["samples"])["colour"] == 1
    assert "the last 5 of 10 frames against the first 5: 12 videos" in printed
    assert report["rows"].keys() == {"samples", "last frames of other videos"}


def test_what_cannot_be_measured_is_one_line(shapes_of_two, tmp_path):
    train, test = shapes_of_two / "train", shapes_of_two / "test"
    samples = continued(test, tmp_path / "samples")
    line = refused(tmp_path, train, samples, "--given", 9)
    assert "--given 9 needs samples of 11 frames or more, and these are 10 frames" in line
    line = refused(tmp_path, train, samples, "--ends", 6)
    assert "--ends 6 needs videos of 12 frames or more, and these are 10 frames" in line
    assert "REAL holds" in refused(tmp_path, test, samples, "--given", 4)
    (samples / "samples.csv").write_text("file,class_name\n000000.mp4,CircleRight\n")
    assert "does not say what each sample started from" in refused(tmp_path, train, samples, "--given", 4)


def test_sources_that_are_gone_are_named(shapes_of_two, tmp_path):
    samples = continued(shapes_of_two / "test", tmp_path / "samples")
    table = samples / "samples.csv"
    table.write_text(table.read_text().replace(str(shapes_of_two / "test"), "gone"))
    line = refused(tmp_path, shapes_of_two / "train", samples, "--given", 4)
    assert "no readable file" in line
    assert "gone/CircleLeft/v_CircleLeft_g01_c01.avi" in line
