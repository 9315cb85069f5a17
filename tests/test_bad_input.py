"""Bad input on the real command line: one line that names the thing, no traceback, no run folder."""

import logging
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT, SMALL, make_pack, run_command, run_python, run_ranks, run_torchrun
from runs.checkpoint import save_checkpoint

Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Run:
    """Runs EqM/<script> as `__main__` in this process, in an empty folder: importing torch anew costs seconds."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    handlers = list(logging.getLogger("EqM").handlers)

    def call(script: str, *arguments: object) -> subprocess.CompletedProcess:
        command = [str(ROOT / "EqM" / script), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capfd.readouterr()
        status: object = 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)
            try:
                runpy.run_path(command[0], run_name="__main__")
            except SystemExit as end:
                status = end.code
        out, err = capfd.readouterr()
        err += "".join(f"\n{warning.message}" for warning in caught if issubclass(warning.category, UserWarning))
        return subprocess.CompletedProcess(command, status, out, err)

    yield call
    logging.getLogger("EqM").handlers[:] = handlers  # those that a script added hold this test's stdout


def error_lines(script: str, stderr: str) -> list[str]:
    return [line for line in re.split("[\r\n]+", stderr) if line.startswith(f"{script}: error: ")]


def assert_refused(result: subprocess.CompletedProcess, script: str, *words: object, folder: Path = Path()) -> None:
    """It failed with one line that has all the words, no traceback and no run folder."""
    assert result.returncode not in (0, None), result.stdout
    (line,) = error_lines(script, result.stderr)
    for word in words:
        assert str(word) in line
    other = [text for text in re.split("[\r\n]+", result.stderr) if text.strip() and text != line]
    assert all(text.startswith("checking files") for text in other), other
    assert "Traceback" not in result.stdout
    assert not (folder / "results").exists()


def assert_refused_once_by_ranks(result: subprocess.CompletedProcess, script: str, *words: str, folder: Path) -> None:
    """As `assert_refused`, with the launcher's own report behind our line."""
    assert result.returncode != 0
    (line,) = error_lines(script, result.stderr)
    for word in words:
        assert word in line
    before, _, _ = result.stderr.partition(line)
    assert "Traceback" not in before
    assert f'File "{ROOT / "EqM"}' not in result.stderr
    assert not (folder / "results").exists()


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--lr", ["-0.1", "0", "nan", "inf", "fast"]),
        ("--epochs", ["0", "-3", "2.5", "ten", "1" + "0" * 40]),
        ("--max-steps", ["0", "-1", ""]),
        ("--global-batch-size", ["0", "-8"]),
        ("--clip-len", ["0", "-4", "four", "1000000000000"]),
        ("--image-size", ["0", "-64", "64x", "x64", "0x5", "64x96x3", "64 x 96", "64X96", "1000000000000", "64x20000"]),
        ("--frame-interval", ["0"]),
        ("--temporal-patch", ["0", "-2"]),
        ("--num-classes", ["0"]),
        ("--warmup-steps", ["-1"]),
        ("--grad-clip", ["-1", "nan"]),
        ("--ema-decay", ["1", "-0.5", "1.5"]),
        ("--class-dropout", ["1", "-0.5", "some"]),
        ("--position-stretch", ["0.9", "17", "nan"]),
        ("--global-seed", ["-1", str(2**63), "x"]),
        ("--num-workers", ["-1"]),
        ("--log-every", ["0"]),
        ("--ckpt-every", ["0"]),
    ],
)
def test_a_training_number_out_of_its_range_is_named_with_its_value(run, shapes, flag, values):
    for value in values:
        assert_refused(run("train.py", "--data-path", shapes, *SMALL, flag, value), "train.py", flag, f"'{value}'")


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--num-fid-samples", ["0", "-1", "many"]),
        ("--num-sampling-steps", ["0", "1.5"]),
        ("--global-batch-size", ["0"]),
        ("--stepsize", ["0", "-0.1", "inf"]),
        ("--mu", ["1", "-0.1"]),
        ("--cfg-scale", ["-1", "high"]),
        ("--target-fps", ["0", "-25"]),
        ("--global-seed", ["-1"]),
        ("--clip-len", ["0"]),
    ],
)
def test_a_sampling_number_out_of_its_range_is_named_with_its_value(run, checkpoint, flag, values):
    for value in values:
        assert_refused(run("sample_gd.py", "--ckpt", checkpoint, flag, value), "sample_gd.py", flag, f"'{value}'")


@pytest.mark.parametrize("script", ["train.py", "sample_gd.py"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "EqM-Z/3"], ["--model", "'EqM-Z/3'", "EqM-S/4"]),
        (["--use-amp", "--use-bf16"], ["--use-amp", "--use-bf16", "not allowed"]),
        (["--learning-rate", "1"], ["--learning-rate"]),
        (["--clip", "1"], ["--clip"]),  # not taken for --clip-len
    ],
)
def test_a_flag_that_cannot_be_meant_is_refused(run, script, flags, words):
    needed = ["--data-path", "there"] if script == "train.py" else ["--ckpt", "there.pt"]
    assert_refused(run(script, *needed, *flags), script, *words)


@pytest.mark.parametrize(
    ("script", "flag"), [("train.py", "--data-path"), ("sample_gd.py", "--ckpt"), ("check_data.py", "path")]
)
def test_a_flag_that_is_needed_is_named(run, script, flag):
    assert_refused(run(script), script, "required", flag)


def missing(folder: Path, shapes: Path) -> list:
    return [folder, "not a folder"]


def a_file(folder: Path, shapes: Path) -> list:
    folder.write_text("hello")
    return [folder, "not a folder"]


def empty(folder: Path, shapes: Path) -> list:
    folder.mkdir()
    return [folder, "no videos"]


def empty_class_folders(folder: Path, shapes: Path) -> list:
    (folder / "Walking").mkdir(parents=True)
    return [folder, "no videos"]


def no_videos(folder: Path, shapes: Path) -> list:
    (folder / "Walking").mkdir(parents=True)
    (folder / "Walking" / "notes.txt").write_text("hello")
    Image.new("RGB", (8, 8)).save(folder / "Walking" / "0.png")
    return [folder, "no videos"]


def no_readable_clip(folder: Path, shapes: Path) -> list:
    (folder / "Walking").mkdir(parents=True)
    path = folder / "Walking" / "v_Walking_g01_c01.avi"
    path.write_text("not a video")
    return ["no readable clip", path]


def splits(folder: Path, shapes: Path) -> list:
    shutil.copytree(shapes, folder / "train")
    shutil.copytree(shapes, folder / "test")
    return ["splits", folder / "test"]


def a_file_without_a_class(folder: Path, shapes: Path) -> list:
    folder.mkdir()
    shutil.copy(next(shapes.glob("*/*.avi")), folder / "holiday.avi")
    return [folder / "holiday.avi", "class"]


def csv_with(content: bytes, *words: str) -> Callable[[Path, Path], list]:
    def make(folder: Path, shapes: Path) -> list:
        folder.mkdir()
        shutil.copy(next(shapes.glob("*/*.avi")), folder / "a.avi")
        (folder / "train.csv").write_bytes(content)
        return [folder / "train.csv", *words]

    return make


def a_csv_of_files_that_are_not_there(folder: Path, shapes: Path) -> list:
    folder.mkdir()
    (folder / "train.csv").write_text("video_name,tag\ngone.avi,Walking\n")
    return [folder / "train.csv", "video_name,tag", "none of its rows (1)", folder / "gone.avi"]


def more_than_a_tenth_unreadable(folder: Path, shapes: Path) -> list:
    shutil.copytree(shapes, folder)
    broken = sorted(folder.glob("*/*.avi"))[:2]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    return ["2 of 16", folder, broken[0]]


DATA = {
    "missing": missing,
    "a file": a_file,
    "empty": empty,
    "empty class folders": empty_class_folders,
    "no videos": no_videos,
    "no readable clip": no_readable_clip,
    "splits": splits,
    "a file without a class": a_file_without_a_class,
    "CSV with wrong columns": csv_with(b"file,kind\na.avi,Walking\n", "video_name,tag", "clip_path"),
    "empty CSV": csv_with(b"", "video_name,tag"),
    "CSV without rows": csv_with(b"video_name,tag\n", "no rows"),
    "CSV without a class": csv_with(b"video_name,tag\na.avi\n", "row 1"),
    "CSV that is no text": csv_with(b"\xff\xfe\x00\x01" * 9, "UTF-8"),
    "CSV of missing files": a_csv_of_files_that_are_not_there,
    "too many unreadable": more_than_a_tenth_unreadable,
}


@pytest.mark.parametrize("make", DATA.values(), ids=DATA.keys())
def test_training_refuses_data_that_it_cannot_use(run, shapes, tmp_path, make):
    words = make(tmp_path / "data", shapes)
    assert_refused(run("train.py", "--data-path", tmp_path / "data", *SMALL, "--num-workers", 0), "train.py", *words)


@pytest.mark.parametrize("make", [missing, a_file, empty, no_videos, splits, a_file_without_a_class])
def test_the_listing_refuses_data_without_files_or_classes(run, shapes, tmp_path, make):
    words = make(tmp_path / "data", shapes)
    assert_refused(run("check_data.py", tmp_path / "data", "--video"), "check_data.py", *words)


@pytest.mark.parametrize(("value", "words"), [("", ["''", "variable"]), ("a" * 5000, ["aaa…", "too long"])])
def test_a_data_path_that_no_folder_can_have_is_refused_by_the_flag(run, value, words):
    assert_refused(run("train.py", "--data-path", value, *SMALL), "train.py", "--data-path", *words)
    assert_refused(run("check_data.py", value), "check_data.py", "path", *words)


@pytest.mark.parametrize("script", ["train.py", "check_data.py"])
def test_videos_without_the_video_flag_are_told_of_it(run, shapes, script):
    arguments = ["--data-path", shapes, "--model", "EqM-Ti/4"] if script == "train.py" else [shapes]
    assert_refused(run(script, *arguments), script, shapes, "no class folders of images", "--video")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image-size", 18], ["EqM-Ti/4", "image size 18x18", "patch size 4"]),
        (["--clip-len", 5, "--temporal-patch", 2], ["clip length 5", "temporal patch 2"]),
        (["--clip-len", 4, "--temporal-patch", 8], ["clip length 4", "temporal patch 8"]),
        (["--num-classes", 3], ["--num-classes 3", "4 classes"]),
    ],
)
def test_sizes_that_do_not_go_together_are_both_named(run, shapes, flags, words):
    assert_refused(run("train.py", "--data-path", shapes, *SMALL, *flags), "train.py", *words)


def test_sizes_are_checked_before_the_data(run):
    assert_refused(run("train.py", "--data-path", "gone", *SMALL, "--image-size", 18), "train.py", "18x18")


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def cut_to(length: float) -> Callable[[Path, Path], None]:
    """A copy of a whole checkpoint up to a share of it, or up to so many bytes before its end."""

    def make(path: Path, whole: Path) -> None:
        data = whole.read_bytes()
        path.write_bytes(data[: int(length * len(data)) if length >= 0 else int(length)])

    return make


def without(key: str) -> Callable[[Path, Path], None]:
    def make(path: Path, whole: Path) -> None:
        contents = torch.load(whole, weights_only=True)
        del contents[key]
        save_checkpoint(path, contents)

    return make


NO_CHECKPOINTS = {
    "missing": (lambda path, whole: None, "no checkpoint"),
    "a folder": (lambda path, whole: path.mkdir(), "checkpoint"),
    "empty": (lambda path, whole: path.write_bytes(b""), "cut short or is no checkpoint"),
    "cut to its header": (cut_to(0.0001), "cut short or is no checkpoint"),
    "cut to a tenth": (cut_to(0.1), "cut short or is no checkpoint"),
    "cut to a half": (cut_to(0.5), "cut short or is no checkpoint"),
    "cut by a thousand bytes": (cut_to(-1000), "cut short or is no checkpoint"),
    "cut by a byte": (cut_to(-1), "cut short or has been changed"),
    "a text": (lambda path, whole: path.write_text("hello, this is text\n"), "is no checkpoint"),
    "zeros": (lambda path, whole: path.write_bytes(bytes(10_000)), "is no checkpoint"),
    "a video": (lambda path, whole: path.write_bytes(b"RIFF\x10\x00\x00\x00AVI LIST" + bytes(99)), "is no checkpoint"),
    "a list": (lambda path, whole: torch.save([1, 2], path), "holds a list"),
    "a tensor": (lambda path, whole: torch.save(torch.ones(3), path), "holds a Tensor"),
    "another dict": (lambda path, whole: torch.save({"state_dict": {}, "epoch": 3}, path), "given.pt"),
    "a published one": (
        lambda path, whole: torch.save({"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}, "opt": {}}, path),
        "has no config",
    ),
    "a model's name": (lambda path, whole: torch.save({"model": "resnet50", "lr": 3}, path), "given.pt"),
    "one bare weight": (lambda path, whole: torch.save({"model": torch.ones(3)}, path), "given.pt"),
    "weights without names": (lambda path, whole: torch.save({0: torch.ones(3)}, path), "given.pt"),
    "one without config": (without("config"), "has no config"),
    "a config of another kind": (
        lambda path, whole: save_checkpoint(path, torch.load(whole, weights_only=True) | {"config": 3}),
        "has no classes",
    ),
    "pickled code": (lambda path, whole: path.write_bytes(pickle.dumps(Trap(path.with_name("trap")))), "no checkpoint"),
    "saved code": (lambda path, whole: torch.save({"model": Trap(path.with_name("trap"))}, path), "other objects"),
}


@pytest.mark.parametrize("script", ["train.py", "sample_gd.py"])
@pytest.mark.parametrize(("make", "words"), [pytest.param(*case, id=name) for name, case in NO_CHECKPOINTS.items()])
def test_a_file_that_is_no_checkpoint_of_ours_is_named(run, shapes, checkpoint, tmp_path, script, make, words):
    path = tmp_path / "given.pt"
    make(path, checkpoint)
    arguments = ["--data-path", shapes, *SMALL] if script == "train.py" else []
    assert_refused(run(script, *arguments, "--ckpt", path), script, path, words)
    assert not (tmp_path / "trap").exists()
    assert not Path("samples").exists()


@pytest.mark.parametrize(
    ("flag", "asked", "trained"),
    [
        ("--model", "EqM-S/4", "EqM-Ti/4"),
        ("--image-size", 32, 16),
        ("--clip-len", 8, 4),
        ("--num-classes", 7, 4),
    ],
)
def test_a_sampling_flag_that_contradicts_the_checkpoint_is_named_with_both_values(
    run, checkpoint, flag, asked, trained
):
    result = run("sample_gd.py", "--ckpt", checkpoint, flag, asked)
    assert_refused(result, "sample_gd.py", f"{flag} {asked}", f"trained with {trained}")
    assert not Path("samples").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "EqM-Ti/8"], ["EqM-Ti/4", "EqM-Ti/8"]),
        (["--image-size", 32], ["(4, 16, 16)", "(4, 32, 32)"]),
        (["--clip-len", 8], ["(4, 16, 16)", "(8, 16, 16)"]),
        (["--num-classes", 7], ["num_classes 4", "has 7"]),
        (["--temporal-patch", 1], ["temporal_patch 2", "has 1"]),
        (["--max-steps", 4], ["--ckpt is at step 4", "--max-steps", "raise"]),
        (["--epochs", 1], ["--ckpt is at step 4", "--epochs", "raise"]),
    ],
)
def test_a_checkpoint_does_not_go_on_with_other_settings(run, shapes, checkpoint, flags, words):
    result = run("train.py", "--data-path", shapes, *SMALL, "--num-workers", 0, "--ckpt", checkpoint, *flags)
    assert_refused(result, "train.py", *words)


def test_a_checkpoint_does_not_go_on_with_other_classes(run, shapes, checkpoint, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    (tmp_path / "data" / "CircleUp").rename(tmp_path / "data" / "StarUp")
    result = run("train.py", "--data-path", tmp_path / "data", *SMALL, "--num-workers", 0, "--ckpt", checkpoint)
    assert_refused(result, "train.py", "CircleUp", "StarUp")


@pytest.mark.parametrize("script", ["train.py", "sample_gd.py"])
def test_weights_that_are_not_of_the_checkpoints_own_network_are_named(run, shapes, checkpoint, tmp_path, script):
    contents = torch.load(checkpoint, weights_only=True)
    for part in ("model", "ema"):
        contents[part].pop("pos_embed")
    save_checkpoint(tmp_path / "odd.pt", contents)
    arguments = ["--data-path", shapes, *SMALL, "--num-workers", 0] if script == "train.py" else []
    assert_refused(run(script, *arguments, "--ckpt", tmp_path / "odd.pt"), script, "pos_embed")


@pytest.mark.parametrize("name", ["Zebra", "4", "-1", "circleright", ""])
def test_an_unknown_class_is_named_with_those_there_are(run, checkpoint, name):
    result = run("sample_gd.py", "--ckpt", checkpoint, "--class", "CircleUp", "--class", name)
    assert_refused(result, "sample_gd.py", f"--class {name} is unknown", "CircleRight", "SquareUp", "0 to 3")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--compose", "CircleUp + 0.5*Zebra"], ["--compose", "class Zebra is unknown", "CircleRight", "0 to 3"]),
        (["--compose", "CircleUp + "], ["--compose 'CircleUp + ' is not a sum from '+ '", "A + 0.5*B", "quotes"]),
        (["--compose", ""], ["--compose ''", "A + 0.5*B"]),
        (["--compose", "0 - CircleRight"], ["--compose '0 - CircleRight'", "weight"]),
        (["--compose", "0 + 1", "--class", 2], ["--class", "--compose", "one of them"]),
        (["--cfg-channels", "4"], ["--cfg-channels", "'4'", "3"]),
        (["--init-noise", 0.5], ["--init-noise", "--init FOLDER"]),
        (["--init", "there", "--init-noise", 0], ["--init-noise", "'0'", "above 0"]),
        (["--init", "there", "--init-noise", 1.01], ["--init-noise", "'1.01'", "at most 1"]),
        (["--init", "there", "--init-noise", "nan"], ["--init-noise", "'nan'"]),
        (["--init", "there"], ["there is not a folder", "videos"]),
        (["--init", "there", "--folder", "there"], ["--init", "--folder", "there"]),
    ],
)
def test_a_start_or_a_sum_that_cannot_be_meant_is_refused(run, checkpoint, flags, words):
    assert_refused(run("sample_gd.py", "--ckpt", checkpoint, *flags), "sample_gd.py", *words)
    assert not Path("samples").exists()


def flat_images(folder: Path, shapes: Path) -> list:
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    return [folder, "no videos", "but images"]


@pytest.mark.parametrize(
    "make", [missing, a_file, empty, empty_class_folders, flat_images, no_videos, no_readable_clip]
)
def test_files_of_another_kind_or_none_are_neither_started_from_nor_scored(run, shapes, checkpoint, tmp_path, make):
    words = [word for word in make(tmp_path / "data", shapes) if word != "no readable clip"]
    assert_refused(run("sample_gd.py", "--ckpt", checkpoint, "--init", tmp_path / "data"), "sample_gd.py", *words)
    assert not Path("samples").exists()
    result = run("score.py", "--ckpt", checkpoint, tmp_path / "data")
    result.stderr = "".join(line for line in re.split("(?<=[\r\n])", result.stderr) if not line.startswith("scoring "))
    assert_refused(result, "score.py", *(word.name if make is no_readable_clip else word for word in words))
    assert not Path("scores.csv").exists()


def test_guidance_without_any_class_to_guide_to_is_refused(run, shapes, checkpoint, tmp_path):
    shutil.copy(next(shapes.glob("*/*.avi")), tmp_path / "a.avi")
    (tmp_path / "only").mkdir()
    shutil.move(tmp_path / "a.avi", tmp_path / "only")
    result = run("sample_gd.py", "--ckpt", checkpoint, "--init", tmp_path / "only", "--cfg-scale", 2)
    assert_refused(result, "sample_gd.py", "--cfg-scale 2 has no class", "--class")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image-size", 32], ["--image-size 32", "trained with 16"]),
        (["--clip-len", 8], ["--clip-len 8", "trained with 4"]),
        (["--class", "Zebra"], ["--class Zebra is unknown", "0 to 3"]),
        (["--class", 0, "--labels"], ["--class", "--labels", "not allowed"]),
        (["--global-batch-size", 0], ["--global-batch-size", "'0'"]),
        (["--output", "scores.png"], ["--output scores.png", ".csv"]),
        (["--output", "/proc/scores.csv"], ["--output /proc/scores.csv cannot be written"]),
        (["gone"], ["gone is not a folder"]),
        (["gone", "too"], ["one PATH, or two"]),
    ],
)
def test_scoring_with_what_contradicts_or_does_not_exist_is_refused(run, shapes, checkpoint, flags, words):
    assert_refused(run("score.py", "--ckpt", checkpoint, shapes, *flags), "score.py", *words)
    assert not Path("scores.csv").exists()


def test_scoring_one_path_against_itself_or_under_unknown_folders_is_refused(run, shapes, checkpoint, tmp_path):
    result = run("score.py", "--ckpt", checkpoint, shapes, f"{shapes}/../train")
    assert_refused(result, "score.py", "two different ones")
    shutil.copytree(shapes / "CircleUp", tmp_path / "clips" / "Elsewhere")
    result = run("score.py", "--ckpt", checkpoint, tmp_path / "clips", "--labels")
    assert_refused(result, "score.py", "--labels", "Elsewhere", "class folder")


def test_a_pack_of_another_size_is_not_scored(run, shapes, checkpoint, tmp_path):
    make_pack(shapes, tmp_path / "pack", image_size=32)
    result = run("score.py", "--ckpt", checkpoint, tmp_path / "pack")
    assert_refused(result, "score.py", tmp_path / "pack", "of 32×32 pixels", "takes videos of 16×16 pixels")


def test_scores_that_are_not_numbers_are_an_error(run, shapes, checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    saved["ema"]["final_layer.linear.bias"][0] = 3e38  # its square is infinite
    save_checkpoint(tmp_path / "nan.pt", saved)
    result = run("score.py", "--ckpt", tmp_path / "nan.pt", shapes)
    (line,) = error_lines("score.py", result.stderr)
    assert result.returncode == 1
    assert "CircleRight" in line
    assert "not finite" in line
    assert not Path("scores.csv").exists()


@pytest.mark.parametrize("below", ["", "results"])
def test_a_results_folder_that_cannot_be_written_is_named(run, shapes, tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / below
    result = run("train.py", "--data-path", shapes, *SMALL, "--num-workers", 0, "--results-dir", target)
    assert_refused(result, "train.py", f"--results-dir {target} cannot be written")


@pytest.mark.parametrize("below", ["", "samples"])
def test_a_sample_folder_that_cannot_be_written_is_named(run, checkpoint, tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / below
    result = run("sample_gd.py", "--ckpt", checkpoint, "--folder", target)
    assert_refused(result, "sample_gd.py", f"--folder {target} cannot be written")


@pytest.mark.parametrize("stale", ["000002.mp4", "000000.gif", "mine.png"])
def test_other_samples_in_the_folder_are_neither_mixed_in_nor_removed(run, checkpoint, stale):
    Path("out").mkdir()
    (Path("out") / stale).write_text("precious")
    result = run("sample_gd.py", "--ckpt", checkpoint, "--folder", "out", "--num-fid-samples", 2)
    assert_refused(result, "sample_gd.py", stale, "--folder")
    assert [path.name for path in Path("out").iterdir()] == [stale]


def test_the_scripts_say_one_line_in_a_process_of_their_own(tmp_path):
    cases = [
        ("train.py", ["--data-path", "gone", *SMALL], "gone"),
        ("sample_gd.py", ["--ckpt", "gone.pt"], "gone.pt"),
        ("check_data.py", ["gone", "--video"], "gone"),
    ]
    for script, arguments, word in cases:
        assert_refused(run_python(script, *arguments, cwd=tmp_path), script, word, folder=tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--global-batch-size", 3], ["--global-batch-size 3", "2 processes"]),  # met by every rank
        (["--data-path", "gone"], ["gone"]),  # met by rank 0 alone
    ],
)
def test_two_training_processes_say_it_once(shapes, tmp_path, flags, words):
    result = run_ranks(2, "train.py", "--data-path", shapes, *SMALL, *flags, cwd=tmp_path)
    assert_refused_once_by_ranks(result, "train.py", *words, folder=tmp_path)


def test_two_sampling_processes_say_it_once(checkpoint, tmp_path):
    result = run_torchrun(2, "sample_gd.py", "--ckpt", checkpoint, "--global-batch-size", 3, cwd=tmp_path)
    assert_refused_once_by_ranks(result, "sample_gd.py", "--global-batch-size 3", "2 processes", folder=tmp_path)
    assert not (tmp_path / "samples").exists()


def run_in_little_memory(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a script that may hold 1.5 GB of data, some of which torch itself takes."""
    limited = ["bash", "-c", 'ulimit -d 1500000 && exec "$@"', "bash"]
    return run_command(*limited, sys.executable, ROOT / "EqM" / script, *arguments, cwd=cwd)


def test_training_out_of_memory_says_what_to_lower(shapes, tmp_path):
    large = ["--video", "--clip-len", 16, "--image-size", 64, "--model", "EqM-S/2", "--global-batch-size", 64]
    result = run_in_little_memory("train.py", "--data-path", shapes, *large, "--num-workers", 0, cwd=tmp_path)
    (line,) = error_lines("train.py", result.stderr)
    assert result.returncode != 0
    assert "out of memory" in line
    assert "--global-batch-size" in line
    assert "Traceback" not in result.stderr


def test_sampling_out_of_memory_says_what_to_lower(checkpoint, tmp_path):
    many = ["--global-batch-size", 20_000, "--num-fid-samples", 20_000]
    result = run_in_little_memory("sample_gd.py", "--ckpt", checkpoint, *many, cwd=tmp_path)
    (line,) = error_lines("sample_gd.py", result.stderr)
    assert result.returncode != 0
    assert "out of memory" in line
    assert "--global-batch-size" in line
    assert "Traceback" not in result.stderr
