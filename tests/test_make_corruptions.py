"""EqM/make_corruptions.py as people run it."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import run_python, run_script
from data.video import iterate_frames, probe_video, write_video
from make_corruptions import shuffled_order


def spoil(
    source: Path,
    destination: Path,
    *flags: object,
    start: Callable[..., subprocess.CompletedProcess] = run_script,
) -> subprocess.CompletedProcess:
    return start("make_corruptions.py", source, destination, *flags, cwd=destination.parent)


def frames_of(path: Path, size: int = 16) -> np.ndarray:
    return np.stack(list(iterate_frames(path, probe_video(path), size)))


def test_clips_become_noise_other_orders_and_still_pictures_of_exactly_their_pixels(shapes, tmp_path):
    result = spoil(shapes, tmp_path / "spoiled", "--image-size", 16, start=run_python)
    assert result.returncode == 0, result.stderr
    clips = sorted(shapes.glob("*/*.avi"))
    for kind in ("noise", "shuffled", "frozen"):
        assert len(list((tmp_path / "spoiled" / kind).glob("*/*.mkv"))) == len(clips)
    for clip in clips[::5]:
        noise, shuffled, frozen = (
            tmp_path / "spoiled" / kind / clip.parent.name / f"{clip.stem}.mkv"
            for kind in ("noise", "shuffled", "frozen")
        )
        whole = frames_of(clip)
        assert np.array_equal(frames_of(frozen), whole[:1].repeat(len(whole), axis=0))
        found = frames_of(shuffled)
        assert not np.array_equal(found, whole)
        assert sorted(frame.tobytes() for frame in found) == sorted(frame.tobytes() for frame in whole)
        values = frames_of(noise) / 127.5 - 1
        assert values.mean() == pytest.approx(0, abs=0.03)
        assert np.mean(abs(values) == 1) == pytest.approx(0.317, abs=0.03)  # of a standard normal beyond 1
        assert probe_video(frozen).frames_per_second == pytest.approx(probe_video(clip).frames_per_second, rel=0.01)


def test_the_seed_says_how_clips_are_spoiled(shapes, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(min(shapes.glob("*/*.avi")), source / "a.avi")
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        assert spoil(source, tmp_path / name, "--image-size", 16, "--seed", seed).returncode == 0
    for kind in ("noise", "shuffled"):
        one, same, other = (frames_of(tmp_path / name / kind / "a.mkv") for name in ("one", "same", "other"))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


def test_an_order_is_neither_the_clips_own_nor_the_reverse():
    rng = np.random.default_rng(0)
    orders = {tuple(shuffled_order(3, rng)) for _ in range(200)}
    assert orders == {(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)}
    assert list(shuffled_order(1, rng)) == [0]


def test_odd_sizes_are_stored_without_loss(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 7, 7, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mkv", frames, 29.97, lossless=True)
    assert np.array_equal(frames_of(tmp_path / "a.mkv", 7), frames)


def test_what_cannot_be_read_is_left_out_and_named(shapes, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "broken.avi").write_text("no video")
    result = spoil(source, tmp_path / "out")
    assert result.returncode == 1
    assert f"make_corruptions.py: error: no readable clip in {source}: {source / 'broken.avi'}" in result.stderr
    assert "Traceback" not in result.stderr
    shutil.copy(min(shapes.glob("*/*.avi")), source / "whole.avi")
    result = spoil(source, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert f"left out {source / 'broken.avi'}" in result.stdout
    assert [path.name for path in (tmp_path / "out" / "frozen").iterdir()] == ["whole.mkv"]
    result = spoil(source, source / "spoiled")
    assert result.returncode == 1
    assert "would be taken for clips" in result.stderr
