"""datasets/make_clip_art.py as people run it, on pictures made here."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import make_clip_art
from conftest import ROOT, run_command

SIDE = 16


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(seed: int, height: int = SIDE, width: int = SIDE, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def source(tmp_path) -> Path:
    """Forty pictures of animals in two folders, twenty of road signs, and three of a class that is too small."""
    folder = tmp_path / "png"
    for i in range(40):
        save(folder / "animals" / ("birds" if i % 2 else ".") / f"animal{i}.png", noise(i))
    for i in range(20):
        save(folder / "road_signs" / f"sign{i}.png", noise(100 + i))
    for i in range(3):
        save(folder / "tools" / f"tool{i}.png", noise(200 + i))
    return folder


def lay_out(source: Path, *flags: object) -> subprocess.CompletedProcess:
    script, out = ROOT / "datasets" / "make_clip_art.py", source.parent / "out"
    return run_command(sys.executable, script, source, out, "--size", SIDE, "--least", 10, *flags, cwd=source.parent)


def names(source: Path, pattern: str = "*/*/*.png") -> set[str]:
    out = source.parent / "out"
    return {path.relative_to(out).as_posix() for path in out.glob(pattern)}


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_pictures_go_to_the_folders_of_their_classes_and_small_classes_are_left_out(source):
    run = lay_out(source)
    assert run.returncode == 0, run.stderr
    assert {name.split("/")[1] for name in names(source)} == {"Animals", "RoadSigns"}
    assert len(names(source)) == 60
    assert "Animals: 40\nRoadSigns: 20" in run.stdout
    (path,) = (source.parent / "out").glob("*/Animals/animal3-*.png")
    assert np.array_equal(read(path), noise(3))


def test_the_split_follows_from_the_names_alone(source):
    assert lay_out(source).returncode == 0
    tests = {Path(name).stem.rsplit("-", 1)[0] for name in names(source, "test/*/*.png")}
    assert 2 <= len(tests) <= 12, "about a tenth of sixty"
    for path in source.rglob("*.png"):  # all pixels change, and every second file goes
        if int(path.stem.lstrip("animlsgto")) % 2:
            path.unlink()
        else:
            save(path, 255 - read(path))
    for path in (source.parent / "out").glob("*/*/*.png"):
        path.unlink()
    assert lay_out(source).returncode == 0
    again = {Path(name).stem.rsplit("-", 1)[0] for name in names(source, "test/*/*.png")}
    assert again == {name for name in tests if int(name.lstrip("animlsgto")) % 2 == 0}


def test_a_name_has_the_number_of_its_sha_256():
    # printf bee | sha256sum: 62cb81b5…
    assert make_clip_art.Picture("", "bee", "", b"").number == pytest.approx(0x62CB81B5 / 2**32, abs=1e-9)


def test_a_picture_is_put_on_white_and_in_the_middle_of_a_square(source):
    pixels = np.zeros((SIDE // 2, SIDE, 4), np.uint8)
    pixels[:, : SIDE // 2] = (255, 0, 0, 255)  # and the right half is transparent black
    save(source / "animals" / "wide.png", pixels)
    assert lay_out(source).returncode == 0
    (path,) = (source.parent / "out").glob("*/Animals/wide-*.png")
    found = read(path)  # (16, 16, 3)
    assert found.shape == (SIDE, SIDE, 3)
    middle = slice(SIDE // 4, 3 * SIDE // 4)
    assert (found[middle, : SIDE // 2] == (255, 0, 0)).all()
    found = found.copy()
    found[middle, : SIDE // 2] = 255
    assert (found == 255).all()


def test_of_equal_pictures_only_the_first_stays_even_under_another_name_and_class(source):
    save(source / "road_signs" / "copy.png", noise(3))
    save(source / "animals" / "zcopy.png", np.concatenate([noise(5), np.full((SIDE, SIDE, 1), 255, np.uint8)], 2))
    run = lay_out(source)
    assert "left out: 2 duplicates" in run.stdout
    assert not [name for name in names(source) if "copy" in name]
    assert len(names(source)) == 60


def test_a_class_is_cut_to_the_number_asked_for(source):
    assert lay_out(source, "--per-class", 20).returncode == 0
    assert len(names(source, "*/Animals/*.png")) == 20
    assert len(names(source, "test/Animals/*.png")) <= 2


def test_files_beyond_a_limit_are_left_out_and_counted(source, monkeypatch):
    folder = source / "animals"
    save(folder / "small.png", noise(1, 15, 15))
    save(folder / "thin.png", noise(2, 200, 16))
    (folder / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    save(folder / "cut.png", noise(3, 64, 64))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    Image.fromarray(noise(4)).save(folder / "other.png", "JPEG")
    (folder / "folder.png").mkdir()
    (folder / "lost.png").symlink_to("nowhere.png")
    run = lay_out(source)
    assert run.returncode == 0, run.stderr
    for line in ("1 long and thin", "2 not a file", "1 smaller than 16 pixels", "3 unreadable"):
        assert f"left out: {line}" in run.stdout
    assert len(names(source)) == 60
    monkeypatch.setattr(make_clip_art, "MAX_PIXELS", SIDE * SIDE - 1)
    assert make_clip_art.read_picture(folder / "animal0.png", source, SIDE) == "too large"


def test_folders_without_a_subject_are_left_out(source):
    for i, name in enumerate(["special", "unsorted", "shapes/stars"] * 12):
        save(source / name / f"picture{i}.png", noise(300 + i))
    assert lay_out(source).returncode == 0
    assert len(names(source)) == 60


def test_repeating_the_command_is_no_harm_and_another_set_in_the_folder_is_refused(source):
    assert lay_out(source).returncode == 0
    before = names(source)
    assert lay_out(source).returncode == 0
    assert names(source) == before
    run = lay_out(source, "--per-class", 10)
    assert run.returncode == 1
    assert "belongs to another set: empty the destination or give another" in run.stderr
    assert names(source) == before


@pytest.mark.parametrize(
    ("flags", "said"), [(["--least", 100], "has 100 pictures: lower --least"), (["--size", 5], "from 16 to 512")]
)
def test_what_cannot_be_laid_out_is_one_line(source, flags, said):
    run = lay_out(source, *flags)
    assert run.returncode != 0
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_a_folder_without_pictures_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    run = lay_out(tmp_path / "empty")
    assert run.returncode == 1
    assert "has no folders of PNG files" in run.stderr
