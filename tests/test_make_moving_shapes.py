import hashlib
import sys
from pathlib import Path

import av
import numpy as np
import pytest

import make_moving_shapes
from conftest import ROOT, run_command
from make_moving_shapes import BACKGROUND, DIRECTIONS, SHAPES, render_clip

SMALL_SET = ["--size", "32", "--frames", "9", "--train-clips", "2", "--test-clips", "1"]


def make(destination: Path, *options: str) -> None:
    script = ROOT / "datasets" / "make_moving_shapes.py"
    result = run_command(sys.executable, script, destination, *SMALL_SET, *options, cwd=destination.parent)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "set"
    make(folder)
    return folder


def decode(path: Path) -> np.ndarray:
    """(T, H, W, 3) in float."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def centroids(clip: np.ndarray) -> np.ndarray:
    """(T, 2): where the pixels brighter than the background lie on average, as (x, y)."""
    bright = clip.max(axis=-1) > BACKGROUND + 60
    return np.array([np.argwhere(frame).mean(axis=0)[::-1] for frame in bright])


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(folder.rglob("*.avi"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_the_layout_is_that_of_ucf_101(made):
    names = sorted(shape.title() + direction.title() for shape in SHAPES for direction in DIRECTIONS)
    assert len(names) == 12
    for split, clips in (("train", 2), ("test", 1)):
        assert sorted(path.name for path in (made / split).iterdir()) == names
        for name in names:
            files = sorted(path.name for path in (made / split / name).iterdir())
            assert files == [f"v_{name}_g01_c{i + 1:02d}.avi" for i in range(clips)]


def test_a_clip_is_mpeg_4_of_the_size_length_and_rate_asked_for(made):
    with av.open(str(made / "train" / "CircleUp" / "v_CircleUp_g01_c01.avi")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "mpeg4"
        assert (stream.height, stream.width, stream.average_rate) == (32, 32, 25)
        assert len(list(container.decode(stream))) == 9


def test_the_same_seed_makes_the_same_files_and_another_seed_others(made, tmp_path):
    make(tmp_path / "again")
    make(tmp_path / "other", "--seed", "1")
    first, again, other = digests(made), digests(tmp_path / "again"), digests(tmp_path / "other")
    assert first == again
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())


def test_no_two_clips_are_the_same(made):
    files = digests(made)
    assert len(files) == len(set(files.values())) == 12 * 3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_shape_moves_the_way_its_class_says(made, direction):
    along = np.array(DIRECTIONS[direction])
    paths = sorted(made.rglob(f"*{direction.title()}_g*.avi"))
    assert len(paths) == 9
    for path in paths:
        places = centroids(decode(path))
        steps = np.diff(places, axis=0)
        assert (steps @ along > 0).all(), path
        travelled = places[-1] - places[0]
        assert travelled @ along > 8, path  # of 32 pixels
        assert abs(travelled @ along[::-1]) < 1, path  # nothing sideways


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_stays_inside_and_keeps_its_size(shape):
    for seed in range(20):
        clip = render_clip(shape, "right", 32, 9, np.random.default_rng(seed)).astype(int)
        bright = clip.max(axis=-1) > BACKGROUND + 60
        assert not bright[:, [0, -1]].any()
        assert not bright[:, :, [0, -1]].any()
        areas = bright.sum(axis=(1, 2))
        assert areas.min() > 0.85 * areas.max() > 0


def test_shapes_differ_in_how_much_of_their_bounding_box_they_fill():
    filled = {}
    for shape in SHAPES:
        bright = render_clip(shape, "up", 64, 1, np.random.default_rng(0))[0].max(axis=-1) > BACKGROUND + 60
        rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
        filled[shape] = bright.sum() / ((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1))
    assert filled["square"] > 0.95
    assert filled["circle"] == pytest.approx(np.pi / 4, abs=0.05)
    assert filled["triangle"] == pytest.approx(0.5, abs=0.08)


def test_colours_and_sizes_vary_from_clip_to_clip():
    clips = [render_clip("circle", "up", 32, 1, np.random.default_rng(seed))[0] for seed in range(12)]
    colours = {tuple(int(value) for value in clip.reshape(-1, 3)[clip.sum(axis=-1).argmax()]) for clip in clips}
    areas = {int((clip.max(axis=-1) > BACKGROUND + 60).sum()) for clip in clips}
    assert len(colours) > 8
    assert max(areas) > 1.4 * min(areas)


def test_a_decoded_clip_is_close_to_the_one_rendered(tmp_path):
    clip = render_clip("square", "left", 64, 16, np.random.default_rng(0))
    make_moving_shapes.write_avi(tmp_path / "a.avi", clip)
    assert np.abs(decode(tmp_path / "a.avi") - clip).mean() < 2


@pytest.mark.parametrize("options", [["--size", "33"], ["--size", "8"], ["--frames", "0"], ["--train-clips", "0"]])
def test_numbers_that_make_no_set_are_refused(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["make_moving_shapes.py", str(tmp_path / "set"), *options])
    with pytest.raises(SystemExit, match="2"):
        make_moving_shapes.main()
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_clips_of_another_set_are_not_mixed_in(made):
    script = ROOT / "datasets" / "make_moving_shapes.py"
    result = run_command(sys.executable, script, made, *SMALL_SET, "--shapes", "circle", cwd=made.parent)
    assert result.returncode == 1
    assert "v_SquareDown_g01_c01.avi belongs to another set" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_destination_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    script = ROOT / "datasets" / "make_moving_shapes.py"
    result = run_command(sys.executable, script, tmp_path / "file" / "set", *SMALL_SET, cwd=tmp_path)
    assert result.returncode == 1
    assert "file/set cannot be written: Not a directory" in result.stderr
    assert result.stderr.count("\n") == 1
