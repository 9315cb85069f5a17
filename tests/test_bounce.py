"""Moving shapes that bounce off the walls, and pictures that are no squares."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest

import make_moving_shapes
from conftest import ROOT, run_command
from make_moving_shapes import BACKGROUND, DIRECTIONS, REACH, SHAPES, bouncing_path, reflected, render_clip
from test_make_moving_shapes import centroids, decode

SIZES = [(32, 32), (32, 48), (48, 32)]


def made(folder: Path, *options: object) -> Path:
    script = ROOT / "datasets" / "make_moving_shapes.py"
    few = ["--train-clips", 1, "--test-clips", 1]
    result = run_command(sys.executable, script, folder / "set", *few, *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "set"


def bright(clip: np.ndarray) -> np.ndarray:
    """(T, H, W): where the shape is."""
    return clip.max(axis=-1) > BACKGROUND + 20


def test_a_reflected_place_keeps_its_speed_and_turns_at_the_walls():
    assert reflected(np.array([2.0, 3.0, 5.0, 6.0, 9.0, 10.0, -3.0]), 1.0, 5.0) == pytest.approx([2, 3, 5, 4, 1, 2, 5])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bouncing_shape_keeps_its_speed_and_turns_only_at_the_four_walls(shape, size):
    walls = set()
    for seed in range(20):
        path = bouncing_path(shape, 6.0, size, 64, np.random.default_rng(seed))  # (64, 2)
        steps = np.diff(path, axis=0)
        for axis, side in enumerate(size[::-1]):
            reach = REACH[shape][axis] * 6
            assert (path[:, axis] >= reach + 1).all()
            assert (path[:, axis] <= side - reach - 1).all()
            speed = np.abs(steps[:, axis]).max()
            for i in np.flatnonzero(np.abs(steps[:, axis]) < speed - 1e-9):  # a step with a wall in it
                low, high = path[i : i + 2, axis].min() - reach, side - reach - path[i : i + 2, axis].max()
                assert min(low, high) < 1 + speed / 2, "a shape turns at a wall"
                walls.add((axis, low < high))
            turns = np.flatnonzero(np.diff(np.sign(steps[:, axis])))
            assert all((np.abs(steps[turn : turn + 2, axis]) < speed - 1e-9).any() for turn in turns)
        assert 0.85 < speed_of(steps) / (min(size) - 2 - 2 * max(REACH[shape]) * 6) * 15 < 1.5
    assert walls == {(0, True), (0, False), (1, True), (1, False)}


def speed_of(steps: np.ndarray) -> float:
    """Pixels a frame, where no wall is met."""
    return float(np.hypot(*np.abs(steps).max(axis=0)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bouncing_shape_is_seen_whole_in_every_frame(shape):
    for seed in range(3):
        clip = render_clip(shape, None, (32, 48), 64, np.random.default_rng(seed))
        assert clip.shape == (64, 32, 48, 3)
        seen = bright(clip)
        assert not seen[:, [0, -1]].any()
        assert not seen[:, :, [0, -1]].any()
        light = (clip.max(axis=-1).astype(float) - BACKGROUND).sum(axis=(1, 2))  # (64,)
        assert light.min() > 0.93 * light.max() > 0
        assert np.ptp(centroids(clip), axis=0).max() > 10


def test_bouncing_shapes_fly_in_all_directions():
    angles = []
    for seed in range(16):
        first, second = centroids(render_clip("circle", None, 32, 2, np.random.default_rng(seed)))
        angles.append(np.arctan2(*(second - first)))
    assert len(np.unique(np.floor(np.array(angles) / (np.pi / 4)))) >= 6


def test_a_longer_clip_begins_as_a_shorter_one():
    short, long = (render_clip("square", None, 32, frames, np.random.default_rng(0)) for frames in (8, 64))
    assert np.array_equal(short, long[:8])


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_shape_crosses_most_of_a_picture_that_is_no_square(direction, size):
    for seed in range(5):
        clip = render_clip("circle", direction, size, 9, np.random.default_rng(seed))
        assert clip.shape == (9, *size, 3)
        places = centroids(clip)
        travelled = (places[-1] - places[0]) @ np.array(DIRECTIONS[direction])
        assert travelled > 0.35 * (size[1] if direction in ("left", "right") else size[0])
        seen = bright(clip)
        assert not seen[:, [0, -1]].any()
        assert not seen[:, :, [0, -1]].any()
        (rows, columns) = (np.flatnonzero(seen[0].any(axis=axis)) for axis in (1, 0))
        assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=1), "a circle is round"


def test_a_class_of_bouncing_shapes_is_a_shape(tmp_path):
    folder = made(tmp_path, "--bounce", "--frames", 20, "--size", "32x48")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.avi"))
    names = [shape.title() for shape in sorted(SHAPES)]
    assert files == [f"{split}/{name}/v_{name}_g01_c01.avi" for split in ("test", "train") for name in names]
    clip = decode(folder / files[0])
    assert clip.shape == (20, 32, 48, 3)
    with av.open(str(folder / files[0])) as container:
        assert container.streams.video[0].average_rate == 25


def test_one_number_and_twice_the_same_make_the_same_pictures(tmp_path):
    folders = []
    for name, size in (("one", "32"), ("two", "32x32")):
        (tmp_path / name).mkdir()
        folders.append(made(tmp_path / name, "--frames", 4, "--shapes", "circle", "--size", size))
    one, two = ([path.read_bytes() for path in sorted(folder.rglob("*.avi"))] for folder in folders)
    assert one == two


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bounce", "--directions", "up"], "--bounce lets shapes fly in any direction: leave --directions out"),
        (["--size", "64x33"], "'64x33' is not one or two even numbers from 16 to 1024"),
        (["--size", "64x"], "'64x' is not one or two"),
        (["--size", "64x64x64"], "'64x64x64' is not one or two"),
        (["--size", "8x64"], "'8x64' is not one or two"),
    ],
)
def test_flags_that_make_no_set_are_refused(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.setattr(sys, "argv", ["make_moving_shapes.py", str(tmp_path / "set"), *options])
    with pytest.raises(SystemExit, match="2"):
        make_moving_shapes.main()
    assert said in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
