"""Training on clips of several lengths and frame intervals: the seed and the place decide those of a batch."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compiled import VERSIONS, allow_versions
from conftest import make_pack, run_ranks, run_script
from data.clips import Samples
from data.form import Form
from data.order import EpochStream, MixedStream
from data.packs.dataset import PackedSamples, unpack
from graphs import WARMUP_CALLS, Graphed
from runs.checkpoint import load_checkpoint
from runs.config import config_of
from runtime.errors import UserError

RUN = "results/000-EqM-Ti-8-Linear-velocity-None"
LENGTHS, INTERVALS = (2, 4, 8), (1, 3)
COMMON = (
    "--video --model EqM-Ti/8 --positions rotary --clip-len 2 4 8 --frame-interval 1 3 --image-size 16 --log-every 1"
    " --global-batch-size 4 --num-workers 0 --no-compile --lr 1e-3 --ema-decay 0.9"
).split()


def stream(first: int = 0, batches: int = 8, rank: int = 0, ranks: int = 1, seed: int = 3) -> MixedStream:
    return MixedStream(EpochStream(10, 4, batches, seed, first, rank, ranks), LENGTHS, INTERVALS)


def drawn(keys: list[list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """The length and the interval of each batch."""
    assert all(len({key[2:] for key in batch}) == 1 for batch in keys), "a batch has one length and one interval"
    return [batch[0][2:] for batch in keys]


def test_lengths_and_intervals_are_drawn_evenly_and_change_with_the_seed():
    pairs = drawn(list(stream(batches=600)))
    assert min(pairs.count((length, interval)) for length in LENGTHS for interval in INTERVALS) > 70
    assert pairs != drawn(list(stream(batches=600, seed=4)))


def test_intervals_leave_the_lengths_of_a_run_as_they_were():
    alone = MixedStream(EpochStream(10, 4, 50, 3, 0, 0, 1), LENGTHS, (1,))
    assert [length for length, _ in drawn(list(alone))] == [length for length, _ in drawn(list(stream(batches=50)))]


def test_a_stream_that_goes_on_has_the_forms_and_keys_that_were_to_come():
    whole = list(stream(batches=20))
    assert len(set(drawn(whole)[7:])) > 3
    assert list(stream(first=7 * 4, batches=13)) == whole[7:]


def test_all_ranks_draw_the_same_forms_and_share_the_keys():
    whole, parts = list(stream(batches=12)), [list(stream(batches=12, rank=rank, ranks=2)) for rank in (0, 1)]
    assert drawn(parts[0]) == drawn(parts[1]) == drawn(whole)
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


@pytest.fixture(scope="module")
def pack(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "pack"
    make_pack(shapes, folder)
    return folder


def test_files_and_packs_have_the_same_clips_of_the_batchs_form(shapes, pack):
    from data.packs.pack import open_pack
    from data.scan import scan_for_training

    form = Form(True, 16, 8, 1, flip=True, lengths=LENGTHS)
    files = Samples(scan_for_training(shapes, True), form, seed=1)
    packed = PackedSamples(open_pack(pack, show_progress=False), form, seed=1)
    for length, interval in ((2, 1), (4, 3), (8, 1), (4, 1), (40, 1)):  # 40 frames are more than a video has
        keys = [(0, 3, length, interval), (0, 8, length, interval), (1, 3, length, interval)]
        batch = packed.__getitems__(keys)
        x = unpack(batch["x"], batch["flip"], video=True)  # (3, 3, T, H, W)
        assert x.shape == (3, 3, length, 16, 16)
        for sample, key in zip(x, keys, strict=True):
            assert torch.equal(files[key]["x"], sample)
        rates = [files.found.videos.rates[key[1]] for key in keys]
        expected = torch.tensor([interval / rate for rate in rates], dtype=torch.float32)
        assert torch.equal(batch["seconds_per_frame"], expected)
        assert [files[key]["seconds_per_frame"] for key in keys] == expected.tolist()
        if length == 40:
            assert torch.equal(x[:, :, -1], x[:, :, -2]), "a short video holds its last frame"
    assert packed.__getitems__([(0, 3)])["x"].shape[1] == 8, "a key without a length has the form's"


@pytest.fixture(scope="module")
def trained(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of eight steps, and what it printed."""
    folder = tmp_path_factory.mktemp("mixed")
    result = run_script("train.py", "--data-path", pack, *COMMON, "--max-steps", 8, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / RUN, result.stdout


def test_the_log_counts_tokens_and_short_videos_of_each_length_and_interval(trained, pack):
    _, printed = trained
    assert "tokens per sample: 4, 8, 16" in printed, "two frames a token, since all lengths are even"
    for length in LENGTHS:
        assert all(f"clips of {length} frames, {interval} apart" in printed for interval in INTERVALS)
    assert printed.count("videos are shorter than a clip, which repeats their last frame") == 6


def test_a_run_keeps_its_forms_and_goes_on_bitwise_across_a_change_of_length(trained, pack, tmp_path):
    whole, _ = trained
    mixed = MixedStream(EpochStream(16, 4, 1, 0, 0, 0, 1), LENGTHS, INTERVALS)
    lengths = [mixed.drawn_at(4 * step)[0] for step in range(8)]
    change = next(step for step in range(2, 8) if lengths[step - 1] != lengths[step])
    first = run_script("train.py", "--data-path", pack, *COMMON, "--max-steps", change, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    again = ["--data-path", pack, "--resume", "--max-steps", 8, "--no-compile", "--log-every", 1]
    result = run_script("train.py", *again, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    one, two = (load_checkpoint(run / "checkpoints" / "0000008.pt") for run in (whole, tmp_path / RUN))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, tmp_path / RUN)
    ]
    assert losses[0] == losses[1]
    config = config_of(two["config"], "it")
    assert (config.lengths, config.form.clip_len, config.kept_flags()["clip_len"]) == (LENGTHS, 8, LENGTHS)
    assert (config.form.frame_interval, config.kept_flags()["frame_interval"]) == (1, INTERVALS)
    assert config.frames_per_second == 25, "of the smallest interval"
    assert config_of(json.loads(json.dumps(config.as_dict())), "it") == config
    command = ["--data-path", pack, *COMMON, "--clip-len", 2, 8, "--resume", "--max-steps", 1]
    other = run_script("train.py", *command, cwd=tmp_path)
    assert "has the given settings: this one is new" in other.stdout


@pytest.mark.slow
def test_two_ranks_train_as_one_does(pack, tmp_path):
    command = ["--data-path", pack, *COMMON, "--max-steps", 5]
    result = run_ranks(2, "train.py", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / RUN / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--clip-len 4 8", "--clip-len 4 8 needs --positions rotary: add it, or give one length"),
        ("--clip-len 4 8 --positions fixed", "--clip-len 4 8 needs --positions rotary"),
        ("--clip-len 4 6 --positions rotary --temporal-patch 4", "6 is not a multiple of the temporal patch 4"),
        ("--clip-len 4 x --positions rotary", "'x' is not a whole number"),
        ("--clip-len", "expected at least one argument"),
        ("--frame-interval 1 0", "'0' is not a whole number from 1"),
    ],
)
def test_lengths_that_make_no_sense_are_refused_in_one_line(pack, tmp_path, flags, line):
    small = ["--video", "--model", "EqM-Ti/8", "--max-steps", 1]
    result = run_script("train.py", "--data-path", pack, *small, *flags.split(), cwd=tmp_path)
    assert result.returncode != 0
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_config_whose_lengths_do_not_fit_is_refused(trained):
    config = json.loads((trained[0] / "config.json").read_text())
    for lengths in ([2, 4], [8, 4, 2, 8], [-2, 8], [0, 8]):
        damaged = config | {"args": config["args"] | {"clip_len": lengths}}
        with pytest.raises(UserError, match="args.clip_len is"):
            config_of(damaged, "config.json")
    fixed = config | {"network": config["network"] | {"positions": "fixed"}}
    with pytest.raises(UserError, match="args.clip_len is"):
        config_of(fixed, "config.json")


def test_a_config_whose_intervals_make_no_sense_is_refused(trained):
    config = json.loads((trained[0] / "config.json").read_text())
    for intervals in ([], [1], [3, 1], [1, 1], [0, 3]):
        damaged = config | {"args": config["args"] | {"frame_interval": intervals}}
        with pytest.raises(UserError, match="frame_interval"):
            config_of(damaged, "it")


class Recorded(Graphed):
    """Notes what is recorded, in place of a CUDA graph."""

    def record(self, shapes: tuple, inputs: tuple[Tensor, ...]) -> None:
        self.noted = [*getattr(self, "noted", []), shapes[0][0]]
        self.recordings[shapes] = Replay(), [torch.empty_like(value) for value in inputs], torch.zeros(())


class Replay:
    def replay(self) -> None:
        pass


def test_graphs_of_several_lengths_wait_until_all_are_warm_and_the_longest_is_recorded_first():
    step = Recorded(lambda x: x.sum(), kinds=3)
    calls = [2] * 5 + [4] * 3 + [8] * 2 + [2, 4, 8, 2, 4, 8, 2, 4, 8]
    for number, length in enumerate(calls):
        step(torch.zeros(length))
        if calls[: number + 1].count(8) <= WARMUP_CALLS:
            assert not hasattr(step, "noted")
    assert step.noted == [8, 2, 4]
    one = Recorded(lambda x: x.sum())
    for length in [2] * 4 + [8] * 4:
        one(torch.zeros(length))
    assert one.noted == [2, 8], "a function of one kind does not wait for others"


def test_a_function_is_compiled_for_as_many_sizes_as_asked():
    def compiled_for(sizes: int) -> int:
        """How many of ten sizes were compiled until torch gave up."""
        torch._dynamo.reset()
        allow_versions(sizes)
        double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False, fullgraph=True)
        try:
            for size in range(1, VERSIONS + 3):
                double(torch.zeros(size))
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            return size - 1
        return size

    try:
        assert compiled_for(0) == VERSIONS
        assert compiled_for(2) == VERSIONS + 2
    finally:
        allow_versions(0)
        torch._dynamo.reset()


def test_short_videos_are_counted_for_each_length(tmp_path, caplog):
    from data.file_list import Found, Names, Videos
    from data.source import Source
    from data.video import VideoInfo

    videos = Videos(VideoInfo(range(frames), 10.0) for frames in (3, 5, 20))
    found = Found("here", ("A",), Names(["a", "b", "c"]), np.zeros(3, np.int64), videos, ())
    with caplog.at_level("INFO"):
        Source(Form(True, 16, 8, 1, lengths=(2, 4, 8)), found, None, None, None).announce()
    assert [line for line in caplog.messages if "shorter" in line] == [
        f"{count} of 3 videos are shorter than a clip, which repeats their last frame" for count in (0, 1, 2)
    ]
