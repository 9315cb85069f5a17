"""Samples of a run while it trains: what they show, and that the run is as it would be without."""

import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, SMALL, run_command, run_ranks, run_script
from drawing.pictures import contact_sheet, read_png
from network_settings import NetworkSettings
from objective import Objective
from precision import Precision
from runs import record
from runs.config import Config
from runs.record import Metrics
from runs.signals import StopSignals
from runs.trackers import Trackers
from runtime import cli
from runtime.random_numbers import sample_noise
from sampling.method import Method
from sampling.previews import SAMPLES, Previews, add_preview_args, preview_method_of
from sampling.starts import Starts
from state import TrainingState
from test_survive import start_script, wait_for_step
from test_train import NAME, assert_same, load, metrics, trained

CPU, FP32 = torch.device("cpu"), Precision("fp32", "fp32", torch.float32)
QUICK = ["--sample-every", 2, "--sample-steps", 3]
# Steps so long that samples show what network and class they are of, after a few steps of training.
LONG_STEPS = ["--lr", 0.01, "--sample-steps", 4, "--sample-stepsize", 0.3]
SAMPLER = ["--num-sampling-steps", 4, "--stepsize", 0.3, "--num-fid-samples", SAMPLES]


ONE_STEP = Method(stepsize=0.1, steps=1)


@pytest.fixture
def no_signal() -> Iterator[StopSignals]:
    signals = StopSignals()
    yield signals
    signals.close()


def new_previews(folder: Path, method: Method | None = ONE_STEP, at_once: int = 8) -> Previews:
    """Of a network that is not trained, of images in two classes, into a folder."""
    torch.manual_seed(0)
    config = Config(NetworkSettings("EqM-Ti/4", 8, 3, 2), ("a", "b"), None, FP32.as_dict())
    state = TrainingState(config.network.build(), FP32, CPU)
    return Previews(method, at_once, state, config, None, folder, Trackers())


@pytest.mark.parametrize("flags", [[], ["--ebm", "dot"]], ids=str)
def test_a_run_that_is_sampled_ends_bitwise_as_one_that_is_not(shapes, tmp_path, flags):
    flags = [*flags, "--max-steps", 5, "--log-every", 1, "--ckpt-every", 3]
    plain = trained(tmp_path, shapes, *flags)
    sampled = trained(tmp_path, shapes, *flags, *QUICK)
    assert sorted(path.name for path in (sampled / "samples").glob("*.png")) == [
        f"000000{step}-sheet.png" for step in (2, 4, 5)
    ]
    for step in (3, 5):
        ours, right = load(sampled, step), load(plain, step)
        assert ours.keys() == right.keys()
        for key in ours.keys() - {"config"}:
            assert_same(ours[key], right[key])
    lines = [[(row["step"], row["loss"], row["grad_norm"]) for row in metrics(run)] for run in (sampled, plain)]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_compiled_run_that_is_sampled_ends_bitwise_as_one_that_is_not(shapes, tmp_path):
    flags = ["--compile", "--max-steps", 5]
    ours, right = (load(trained(tmp_path, shapes, *flags, *more), 5) for more in (QUICK, []))
    assert_same(ours["model"], right["model"])
    assert_same(ours["ema"], right["ema"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["", "--use-bf16", "--use-amp"])
def test_a_deterministic_run_on_a_gpu_that_is_sampled_ends_bitwise_as_one_that_is_not(shapes, tmp_path, precision):
    script = [sys.executable, ROOT / "EqM" / "train.py", *SMALL, "--num-workers", 0, "--data-path", shapes]
    flags = [*precision.split(), "--deterministic", "--global-batch-size", 8, "--max-steps", 24]
    for more in ([], QUICK):
        run = run_command(*script, *flags, *more, cwd=tmp_path, gpu="0")
        assert run.returncode == 0, run.stderr
        assert "running" not in run.stdout  # eagerly, or without a graph
    ours, right = (load(run, 24) for run in sorted((tmp_path / "results").iterdir()))
    for key in ours.keys() - {"config"}:
        assert_same(ours[key], right[key])


@pytest.mark.parametrize(
    ("flags", "sampler", "processes"),
    [
        ([], ["--global-batch-size", 8], 0),
        (["--micro-batch-size", 4, "--sample-cfg-scale", 3], ["--global-batch-size", 2, "--cfg-scale", 3], 0),
        ([], ["--global-batch-size", 8], 2),
    ],
    ids=["as it is", "guided, in small batches", "two processes"],
)
def test_a_sheet_shows_what_the_sampler_makes_of_the_checkpoint_of_its_step(
    shapes, tmp_path, flags, sampler, processes
):
    flags = [*LONG_STEPS, *flags, "--max-steps", 4, "--sample-every", 2]
    run = trained(tmp_path, shapes, *flags, processes=processes)
    checkpoint = run / "checkpoints" / "0000004.pt"
    arguments = ["sample_gd.py", "--ckpt", checkpoint, "--folder", "other", *SAMPLER, *sampler]
    sampled = run_ranks(processes, *arguments, cwd=tmp_path) if processes else run_script(*arguments, cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    earlier, sheet = (read_png(run / "samples" / f"000000{step}-sheet.png") for step in (2, 4))
    assert np.array_equal(sheet, read_png(tmp_path / "other-sheet.png"))
    assert not np.array_equal(sheet, earlier)
    names = [f"{index:06d}.mp4" for index in range(SAMPLES)]
    assert sorted(path.name for path in (run / "samples" / "0000004").iterdir()) == names
    for name in names:
        with av.open(str(run / "samples" / "0000004" / name)) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
            assert np.shape(frames) == (4, 16, 16, 3)


def test_sheets_of_images_have_no_videos(tmp_path):
    for i in range(8):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i * 30, 0, 0)).save(folder / f"{i}.png")
    flags = ["--image-size", 16, "--model", "EqM-Ti/4", "--num-workers", 0, "--max-steps", 2, *QUICK]
    run = run_script("train.py", "--data-path", tmp_path / "images", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (sheet,) = (tmp_path / "results").glob("*/samples/*")
    assert sheet.name == "0000002-sheet.png"
    assert run.stdout.count("samples of step 2, in ") == 1


def test_samples_start_from_the_same_noise_and_leave_the_global_generator_alone(tmp_path, no_signal):
    previews = new_previews(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = previews.sample(no_signal)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again = previews.sample(no_signal)
    assert sorted(first) == list(range(SAMPLES))
    assert all(np.array_equal(first[i].frames, again[i].frames) for i in first)
    assert not np.array_equal(first[0].frames, first[2].frames)


def test_samples_that_are_not_finite_are_grey_and_a_warning(tmp_path, no_signal, caplog):
    previews = new_previews(tmp_path)
    average = previews.state.averaged_network()  # on one rank, views of the state's own average
    torch.nn.init.constant_(average.y_embedder.embedding_table.weight.data[1], torch.nan)
    before = previews.state.share.average.clone()
    previews.state.step = 2
    previews.show(no_signal)
    assert "step 2: 8 of 16 samples are not finite, and are shown grey" in caplog.text
    good = previews.sample(no_signal)
    grey = np.full((1, 8, 8, 3), 128, np.uint8)
    right = contact_sheet([grey if i % 2 else good[i].frames for i in range(SAMPLES)], ["a", "b"] * 8)
    assert np.array_equal(read_png(tmp_path / "samples" / "0000002-sheet.png"), right)
    torch.testing.assert_close(previews.state.share.average, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no samples of step 2: out of memory"),
        (OSError(28, "No space left on device"), "samples cannot be written: No space left on device"),
    ],
    ids=["memory", "disk"],
)
def test_samples_that_cannot_be_had_are_an_error_in_the_log_and_no_end(
    tmp_path, no_signal, monkeypatch, caplog, error, said
):
    previews = new_previews(tmp_path)

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(previews, "write" if isinstance(error, OSError) else "sample", fail)
    previews.state.step = 2
    assert previews.show(no_signal) > 0
    assert said in caplog.text
    monkeypatch.undo()
    previews.show(no_signal)
    assert (tmp_path / "samples" / "0000002-sheet.png").exists()


def test_without_a_method_nothing_is_sampled_or_written(tmp_path, no_signal):
    assert new_previews(tmp_path, method=None).show(no_signal) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ("--sample-steps 3", None),
        ("--sample-every 5", Method()),
        (
            "--sample-every 5 --sample-steps 3 --sample-stepsize 0.2 --sample-cfg-scale 4",
            Method(stepsize=0.2, steps=3, cfg_scale=4.0),
        ),
        ("--sample-every 5 --no-uncond", Method("euler")),
    ],
)
def test_the_flags_say_how_previews_are_sampled(flags, method):
    parser = cli.ArgumentParser("")
    parser.add_argument("--no-uncond", dest="uncond", action="store_false")
    add_preview_args(parser)
    assert preview_method_of(parser.parse_args(flags.split()), Objective()) == method


@pytest.mark.parametrize(("cfg_scale", "largest"), [(1.0, 5), (3.0, 2)])
def test_the_network_sees_no_more_samples_at_once_than_it_may(tmp_path, no_signal, monkeypatch, cfg_scale, largest):
    seen = []
    monkeypatch.setattr(
        Starts, "__call__", lambda self, indices: seen.append(indices) or sample_noise(0, indices, self.shape)
    )
    new_previews(tmp_path, replace(ONE_STEP, cfg_scale=cfg_scale), at_once=5).sample(no_signal)
    assert max(map(len, seen)) <= largest
    assert [index for indices in seen for index in indices] == list(range(SAMPLES))


def test_a_network_that_sees_gamma_is_sampled_over_time_as_the_sampler_does(shapes, tmp_path):
    run = trained(tmp_path, shapes, "--no-uncond", "--max-steps", 2, "--sample-every", 2, *LONG_STEPS)
    flags = ["--ckpt", run / "checkpoints" / "0000002.pt", "--sampler", "euler", *SAMPLER]
    assert run_script("sample_gd.py", *flags, "--folder", "own", cwd=tmp_path).returncode == 0
    ours, right = (
        read_png(path).astype(int) for path in (run / "samples/0000002-sheet.png", tmp_path / "own-sheet.png")
    )
    assert abs(ours - right).max() <= 1


def test_a_signal_breaks_sampling_off_and_is_obeyed_by_the_next_step(shapes, tmp_path):
    flags = ["--data-path", shapes, "--num-workers", 0, "--sample-every", 1, "--sample-steps", 10**7]
    process = start_script("train.py", *SMALL, *flags, cwd=tmp_path)
    wait_for_step(tmp_path, 1, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 75, said
    assert "WARNING no samples of step 1: the run was asked to stop" in said
    run = tmp_path / "results" / NAME
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["0000002.pt"]
    assert not (run / "samples").exists()


def test_a_resumed_run_replaces_the_sheets_after_its_checkpoint(shapes, tmp_path):
    flags = ["--log-every", 1, "--resume", "--ckpt-every", 2]
    run = trained(tmp_path, shapes, *flags, "--max-steps", 5, *QUICK)
    sheet = run / "samples" / "0000004-sheet.png"
    right = sheet.read_bytes()
    for path in (sheet, run / "samples" / "0000002-sheet.png"):
        path.write_bytes(b"an earlier try")
    for step in (4, 5):
        (run / "checkpoints" / f"{step:07d}.pt").unlink()
    again = run_script("train.py", "--data-path", shapes, *SMALL, *flags, "--max-steps", 4, *QUICK, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert sheet.read_bytes() == right
    assert (run / "samples" / "0000002-sheet.png").read_bytes() == b"an earlier try"


def test_seconds_of_sampling_do_not_count_as_training(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(record.time, "perf_counter", lambda: clock[0])
    rows = []
    metrics = Metrics(tmp_path, CPU, 0, 0, rows.append, began=93.0)
    clock[0] += 10
    metrics.leave_out(6.0)
    metrics.write(torch.ones(3), 8, 1.0, step=2)
    clock[0] += 2
    metrics.write(torch.ones(3), 16, 0.0, step=4)
    assert [(row["samples_per_second"], row["waiting_for_data"]) for row in rows] == [(2.0, 0.25), (4.0, 0.0)]
    assert [row["training_seconds"] for row in rows] == [11, 13], "seven for compiling, four and two for the steps"
