"""Videos that are longer than the clips that the network sees: windows, each begun from the one before."""

import gc
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch

from conftest import run_ranks, run_script
from data.latent_space import LatentSpace
from data.video import encoder, probe_video
from drawing.pictures import read_png, shown_places
from objective import Objective
from runtime.errors import UserError
from runtime.random_numbers import sample_noise
from sampling.descent import Finished
from sampling.long_videos import LongWriter
from sampling.method import Method
from sampling.outputs import Output
from sampling.plan import Plan
from sampling.sampler import Sampler
from sampling.starts import Starts
from sampling.windows import Windows, choose_windows
from test_given_frames import PATCHED, clips_of, lively_network
from test_sample_gd import assert_same_frames, image_checkpoint, lively_checkpoint, read_video, rows  # noqa: F401
from test_starts import CONFIG

METHOD = Method(stepsize=0.05, mu=0.3, steps=5)


@pytest.mark.parametrize("total", [4, 5, 6, 7, 16, 61])
@pytest.mark.parametrize(("length", "overlap"), [(4, 0), (4, 1), (4, 3), (5, 2)])
def test_windows_make_each_frame_once_and_all_but_the_last_are_whole(total, length, overlap):
    if total < length:
        pytest.skip("shorter than a window")
    windows, made = Windows(total, length, overlap), []
    for window in range(len(windows)):
        frames = window * (length - overlap) + np.arange(length)  # of the video
        added = frames[windows.added(window)]
        assert added[0] == windows.first(window)
        assert len(added) > 0
        assert len(added) == length - (overlap if window else 0) or window == len(windows) - 1
        made.extend(added)
    assert made == list(range(total))


def sampler_of(windows: Windows | None, by_frame: float = 0.0, batch: int = 2, **method: object) -> Sampler:
    network = lively_network()
    starts = Starts(5, network.input_shape, objective=Objective(by_frame=by_frame))
    plan = Plan([0, 2], [], starts, ("a", "b", "c", "no class"), windows)
    return Sampler(replace(METHOD, **method), network, plan, 0.12, batch)


@torch.no_grad()
def windows_of(sampler: Sampler, batches: list[range]) -> dict[tuple[int, int], Finished]:
    """All windows, by sample and window."""
    made = [finished for group in sampler.samples(batches, False, lambda evaluations: None) for finished in group]
    return {(finished.index, finished.window): finished for finished in made}


@pytest.mark.parametrize("by_frame", [0.0, 0.5])
@pytest.mark.parametrize("method", [{}, {"sampler": "gd"}, {"cfg_scale": 1.5}])
def test_each_window_begins_with_the_last_frames_of_the_one_before(by_frame, method):
    made = windows_of(sampler_of(Windows(11, 4, 2), by_frame, **method), [range(2), range(2, 3)])
    assert set(made) == {(index, window) for index in range(3) for window in range(5)}
    for index in range(3):
        for window in range(1, 5):
            before, after = made[index, window - 1].x, made[index, window].x
            assert torch.equal(after[:, :2], before[:, 2:])
            assert not torch.equal(after[:, 2], before[:, 0]), "no more frames are held"
            assert (after[:, 2:] - before[:, 2:]).abs().mean() > 0.1
    assert made[0, 4].evaluations == 5 * METHOD.steps


def test_the_first_window_is_the_ordinary_sample_and_windows_have_noise_of_their_own():
    (ordinary,) = windows_of(sampler_of(None, batch=1), [range(1)]).values()
    made = windows_of(sampler_of(Windows(12, 4, 0), batch=1), [range(1)])
    assert torch.equal(made[0, 0].x, ordinary.x)
    shape = (3, 4, 16, 16)
    noises = [sample_noise(5, [7], shape, window) for window in range(3)]
    assert torch.equal(noises[0], sample_noise(5, [7], shape))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(torch.corrcoef(torch.stack([noises[one].flatten(), noises[other].flatten()]))[0, 1]) < 0.1
        assert (made[0, one].x - made[0, other].x).abs().mean() > 0.1


def test_windows_are_held_as_the_network_was_trained():
    seen = []

    class Watched(Sampler):
        def descend(self, indices, x, steps, watch=None, hold=None):  # noqa: ANN001, ANN202
            seen.append(hold and hold.levels[0])
            return super().descend(indices, x, steps, watch, hold)

    for by_frame in (0.0, 0.5):
        sampler = sampler_of(Windows(6, 4, 2), by_frame)
        sampler.__class__ = Watched
        windows_of(sampler, [range(2)])
    assert seen == [None, (0.0, 1.0), None, (1.0, 0.0)]


def held() -> int:
    """Bytes that the tensors of this process hold."""
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.layout == torch.strided]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_memory_does_not_grow_with_the_length():
    def most(total: int) -> int:
        """The most bytes that tensors hold at the end of a window."""
        sampler, found = sampler_of(Windows(total, 4, 2)), []
        with torch.no_grad():
            for _ in sampler.samples([range(2)], False, lambda evaluations: None):
                found.append(held())
        return max(found[1:])

    assert most(30) <= most(8)


def test_a_video_that_is_not_finished_leaves_no_file(tmp_path):
    for suffix in (".mp4", ".gif"):
        output, windows = Output(tmp_path, suffix, 10.0), Windows(6, 4, 2)
        with pytest.raises(ZeroDivisionError), LongWriter(output, windows) as writer:
            x = torch.zeros(1, 3, 4, 16, 16)
            writer.take([Finished(0, x[0], 1, [[0.0]], 0)], x, torch.zeros(1, 4, 16, 16, 3, dtype=torch.uint8))
            writer.go_on(0, 0)
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


def test_parts_make_the_same_video_as_the_whole(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    for name, parts in (("whole", [frames]), ("parts", [frames[:4], frames[4:5], frames[5:]])):
        with encoder(tmp_path / name, (16, 16), 10.0) as add:
            for part in parts:
                add(part)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


def long_sampled(checkpoint: Path, folder: Path, *flags: object, processes: int = 0) -> CompletedProcess:
    folder.mkdir(exist_ok=True)
    steps = ["--num-sampling-steps", 3, "--stepsize", 0.05]
    arguments = ["sample_gd.py", "--ckpt", checkpoint, "--folder", "out", *steps, *flags]
    return run_ranks(processes, *arguments, cwd=folder) if processes else run_script(*arguments, cwd=folder)


def test_the_command_makes_long_videos_in_any_batch_and_number_of_processes(lively_checkpoint, tmp_path):  # noqa: F811
    common = ["--frames", 11, "--overlap", 2, "--num-fid-samples", 3]
    run = long_sampled(lively_checkpoint, tmp_path / "one", *common)
    assert run.returncode == 0, run.stderr
    assert "--frames: 5 windows of 4 frames, 2 of them held at the noise of the rest" in run.stdout
    folder = tmp_path / "one" / "out"
    table = rows(folder)
    assert [(row["frames"], row["overlap"], row["evaluations"]) for row in table] == [("11", "2", "15")] * 3
    frames, stream = read_video(folder / "000002.mp4")
    assert frames.shape == (11, 16, 16, 3)
    assert float(stream.average_rate) == pytest.approx(25 / 3, rel=1e-3)
    parts = long_sampled(lively_checkpoint, tmp_path / "two", *common, "--global-batch-size", 2, processes=2)
    assert parts.returncode == 0, parts.stderr
    assert_same_frames(tmp_path / "two" / "out", folder)
    sheet = read_png(tmp_path / "one" / "out-sheet.png").astype(int)
    shown = sheet[24:88, 8 : 8 + 8 * 66].reshape(64, 8, 66, 3)[:, :, :64].transpose(1, 0, 2, 3)[:, ::4, ::4]
    first = read_video(folder / "000000.mp4")[0].astype(int)
    for frame, place in zip(shown, shown_places(11), strict=True):
        distances = [abs(frame - each).mean() for each in first]
        assert np.argmin(distances) == place, "the sheet shows frames that are evenly spread"


def test_a_long_video_goes_on_from_given_frames(lively_checkpoint, shapes, tmp_path):  # noqa: F811
    given = ["--init", shapes, "--keep-frames", 2, "--class", "none"]
    flags = ["--frames", 6, "--num-fid-samples", 2, *given, "--video-format", "gif"]
    run = long_sampled(lively_checkpoint, tmp_path, *flags)
    assert run.returncode == 0, run.stderr
    sheet = read_png(tmp_path / "out-sheet.png")
    height = 64
    upper, lower = sheet[24 : 24 + height, 8 : 8 + 2 * 66], sheet[26 + height : 26 + 2 * height, 8 : 8 + 2 * 66]
    assert np.array_equal(upper, lower), "the first frames are the given ones, to the bit"
    assert len(probe_video(tmp_path / "out" / "000001.gif").times) == 6
    assert clips_of(shapes)[0].shape[1] == 4
    assert rows(tmp_path / "out")[0]["overlap"] == "2"


def test_the_overlap_is_a_quarter_of_a_window_in_whole_tokens_unless_a_flag_says_it():
    sixteen = replace(PATCHED, network=replace(PATCHED.network, input_size=(16, 16, 16)))
    assert choose_windows(128, None, sixteen) == Windows(128, 16, 4)
    assert choose_windows(128, 8, sixteen) == Windows(128, 16, 8)
    assert choose_windows(128, 0, sixteen).overlap == 0
    assert choose_windows(9, None, PATCHED) == Windows(9, 4, 2)
    assert choose_windows(9, None, CONFIG) == Windows(9, 4, 1)
    with pytest.raises(UserError, match="--overlap 5: clips of 16 frames are cut into tokens of 2 frames: give 4 or 6"):
        choose_windows(128, 5, sixteen)
    with pytest.raises(UserError, match="--overlap 16: .*: give 12 or 14"):
        choose_windows(128, 16, sixteen)
    whole_clips = replace(PATCHED, space=LatentSpace("wan", "", 1.0, 3, 8, time_factor=4))
    with pytest.raises(UserError, match="--frames: the VAE wan has 4 frames a frame of latents, but for the first"):
        choose_windows(128, None, whole_clips)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--overlap", 2], "--overlap says how the windows of --frames N overlap: give that too"),
        (["--frames", 8, "--adaptive", 1], "which --adaptive does not fit: leave one out"),
        (["--frames", 8, "--sampler", "euler"], "which --sampler euler does not fit: leave one out"),
        (["--frames", 8, "--init", "x"], "say with --keep-frames how many are given"),
        (["--frames", 8, "--init", "x", "--keep-mask", "m"], "say with --keep-frames how many are given"),
        (["--frames", 8, "--trace"], "which --trace does not fit: leave one out"),
        (["--frames", 3], "--frames 3: the network makes 4 frames at once: give as many, or more"),
        (
            ["--frames", 8, "--overlap", 3],
            "--overlap 3: clips of 4 frames are cut into tokens of 2 frames: give 0 or 2",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, words, checkpoint, tmp_path):
    run = long_sampled(checkpoint, tmp_path, *flags)
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if "error" in line]
    assert words in line


def test_images_have_no_length(image_checkpoint, tmp_path):  # noqa: F811
    run = long_sampled(image_checkpoint, tmp_path, "--frames", 8)
    assert "--frames is for videos, and the checkpoint makes images: leave it out" in run.stderr
