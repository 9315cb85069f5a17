"""EqM/sample_gd.py as people run it."""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from subprocess import CompletedProcess

import av
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, run_python, run_ranks, run_script, run_torchrun
from drawing.pictures import read_png
from models import EqM
from network_settings import NetworkSettings
from objective import Objective
from runs.checkpoint import save_checkpoint
from runs.config import Config
from runtime import cli, distributed
from runtime.distributed import batches_of_rank
from runtime.errors import UserError
from runtime.random_numbers import sample_noise
from sampling import outputs
from sampling.descent import Finished
from sampling.method import Method, add_method_args, check_method, method_of
from sampling.outputs import Output, Writer
from sampling.plan import Plan, PlanRequest, make_plan
from sampling.sampler import Sampler
from sampling.starts import StartRequest, Starts
from sampling.stepsizes import plan_steps

STEPS = ["--num-sampling-steps", 3]
CPU = torch.device("cpu")


def sampled(
    checkpoint: Path,
    folder: Path,
    *flags: object,
    processes: int = 0,
    start: Callable[..., CompletedProcess] = run_script,
    launch: Callable[..., CompletedProcess] = run_ranks,
) -> Path:
    arguments = ["sample_gd.py", "--ckpt", checkpoint, "--folder", "out", *STEPS, *flags]
    run = launch(processes, *arguments, cwd=folder) if processes else start(*arguments, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder / "out"


def read_video(path: Path) -> tuple[np.ndarray, av.video.stream.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream


def rows(folder: Path) -> list[dict]:
    with (folder / "samples.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_tables(ours: list[dict], right: list[dict]) -> None:
    """Everything but the norms is the same to the letter."""
    assert [float(row.pop("final_norm")) for row in ours] == pytest.approx(
        [float(row.pop("final_norm")) for row in right], rel=1e-3
    )
    assert ours == right


def assert_same_frames(ours: Path, right: Path) -> None:
    """On the contact sheets, which show all frames: a video file is lossy, and a pixel's rounding changes others."""
    found, expected = (read_png(folder.with_name(folder.name + "-sheet.png")).astype(int) for folder in (ours, right))
    assert abs(expected - found).max() <= 1


@pytest.fixture(scope="module")
def lively_checkpoint(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with larger output weights, so that the field moves samples a long way."""
    saved = torch.load(checkpoint, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    weight = saved["ema"]["final_layer.linear.weight"]
    saved["ema"]["final_layer.linear.weight"] = torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp("lively") / "lively.pt"
    save_checkpoint(path, saved)
    return path


@pytest.fixture(scope="module")
def image_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, colour in (("red", (250, 10, 10)), ("blue", (10, 10, 250))):
        (folder / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(folder / "data" / name / "0.png")
    flags = ["--image-size", 16, "--model", "EqM-Ti/4", "--max-steps", 2, "--num-workers", 0]
    run = run_script("train.py", "--data-path", "data", *flags, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder / "results" / "000-EqM-Ti-4-Linear-velocity-None" / "checkpoints" / "0000002.pt"


def test_videos_are_h264_files_of_the_trained_length_and_rate(checkpoint, tmp_path):
    flags = ["--num-fid-samples", 5, "--video", "--clip-len", 4, "--model", "EqM-Ti/4"]
    folder = sampled(checkpoint, tmp_path, *flags, start=run_python)
    assert sorted(path.name for path in folder.glob("*.mp4")) == [f"{i:06d}.mp4" for i in range(5)]
    frames, stream = read_video(folder / "000004.mp4")
    assert frames.shape == (4, 16, 16, 3)
    assert stream.codec_context.name == "h264"
    assert float(stream.average_rate) == pytest.approx(25 / 3, rel=1e-3)
    assert Image.open(tmp_path / "out-sheet.png").width > 256


def test_the_table_says_class_seed_and_settings_of_each_file(checkpoint, tmp_path):
    flags = ["--num-fid-samples", 3, "--class", "SquareUp", "--class", 0, "--global-seed", 7, "--target-fps", 5]
    folder = sampled(checkpoint, tmp_path, *flags, "--use-bf16", "--cfg-scale", 2)
    table = rows(folder)
    assert [row["file"] for row in table] == ["000000.mp4", "000001.mp4", "000002.mp4"]
    assert [row["class_name"] for row in table] == ["SquareUp", "CircleRight", "SquareUp"]
    assert [row["class"] for row in table] == ["3", "0", "3"]
    stepsize = f"auto: {plan_steps(Objective(), 3)}"
    expected = {"seed": "7", "sampler": "ngd", "stepsize": stepsize, "mu": "auto", "steps": "3", "cfg_scale": "2.0"}
    assert expected.items() <= table[0].items()
    assert table[0]["precision"] == "fp32"
    assert float(read_video(folder / "000000.mp4")[1].average_rate) == 5


def test_a_fallback_is_said_once(checkpoint, tmp_path):
    run = run_script("sample_gd.py", "--ckpt", checkpoint, "--num-fid-samples", 1, *STEPS, "--use-amp", cwd=tmp_path)
    assert run.returncode == 0
    (line,) = [line for line in run.stdout.splitlines() if "precision:" in line]
    assert "WARNING precision: fp32 IEEE (fp16 requested: fp16 needs a CUDA GPU" in line


def test_gifs_have_every_frame(checkpoint, tmp_path):
    folder = sampled(checkpoint, tmp_path, "--num-fid-samples", 1, "--video-format", "gif")
    with Image.open(folder / "000000.gif") as image:
        assert image.n_frames == 4


@pytest.mark.parametrize(("flags", "processes"), [(["--global-batch-size", 1], 0), (["--global-batch-size", 4], 2)])
def test_videos_do_not_depend_on_batch_size_or_number_of_processes(lively_checkpoint, tmp_path, flags, processes):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    common = ["--num-fid-samples", 5, "--stepsize", 0.05]
    whole = sampled(lively_checkpoint, tmp_path / "one", *common)
    how = {"processes": processes, "launch": run_torchrun}
    parts = sampled(lively_checkpoint, tmp_path / "other", *common, *flags, **how)
    assert_same_frames(parts, whole)
    assert_same_tables(rows(whole), rows(parts))


class FallingField(EqM):
    """A field whose norm falls on the way, at another rate for each sample."""

    def field(self, x: torch.Tensor, *modulations: torch.Tensor, seconds_per_frame: float) -> torch.Tensor:
        return 0.3 * super().field(x, *modulations, seconds_per_frame=seconds_per_frame) - 2 * x


def random_network(kind: type[EqM], uncond: bool = True) -> EqM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "temporal_patch": 2}
    network = kind((4, 8, 8), 4, 3, **sizes, uncond=uncond)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.requires_grad_(False)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_a_sample_is_the_same_alone_and_in_a_batch_before_rounding(cfg_scale):
    network, method = random_network(EqM), Method(stepsize=0.01, cfg_scale=cfg_scale)
    plan = Plan([0, 1, 2], [], Starts(3, network.input_shape))

    @torch.no_grad()
    def sample(indices: list[int]) -> torch.Tensor:
        sampler = Sampler(method, network, plan, seconds_per_frame=0.12, batch=len(indices))
        return sampler.descend(indices, sampler.starts(indices), range(50))

    together = sample(range(64))
    for share in ([0], [3], [63], range(0, 64, 2), range(1, 64, 2)):  # the last two are those of two processes
        torch.testing.assert_close(sample(share), together[list(share)], atol=1e-4, rtol=0)
    assert (together[0] - together[3]).abs().max() > 0.1


@pytest.mark.parametrize(("cfg_scale", "guided"), [(1.0, None), (2.5, None), (2.5, 3)])
@pytest.mark.parametrize("terms", [[], [(1.0, 0), (-0.5, 2)]])
def test_the_field_is_that_of_the_method_and_the_sum(cfg_scale, guided, terms):
    torch.manual_seed(0)
    network = EqM((4, 8, 8), 4, 4, hidden_size=32, depth=1, num_heads=2, num_classes=3, temporal_patch=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, y = torch.randn(2, 4, 4, 8, 8), torch.tensor([1, 2])

    @torch.no_grad()
    def of_class(labels: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = (network(x, torch.zeros(2), label, 0.12) for label in (labels, 0 * labels + 3))
        field = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([field[:, :3], conditional[:, 3:]], dim=1) if guided else field

    by_hand = sum(weight * of_class(0 * y + label) for weight, label in terms) if terms else of_class(y)
    with torch.no_grad():
        plan, method = (
            Plan([0], terms, Starts(0, network.input_shape)),
            Method(cfg_scale=cfg_scale, guided_channels=guided),
        )
        field = Sampler(method, network, plan, 0.12, batch=2).field(y)
        torch.testing.assert_close(field(x), by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ("", Method()),
        (
            "--sampler gd --stepsize 0.1 --mu 0.5 --num-sampling-steps 7 --adaptive 2 --cfg-scale 3 --cfg-channels 3",
            Method("gd", 0.1, 0.5, 7, 2.0, 3.0, 3),
        ),
        ("--sampler euler", Method("euler")),
    ],
)
def test_the_flags_choose_the_method(flags, method):
    parser = cli.ArgumentParser("")
    add_method_args(parser)
    args = parser.parse_args(flags.split())
    check_method(args)
    assert method_of(args, Objective()) == method


def test_steps_over_time_do_not_stop_by_themselves():
    parser = cli.ArgumentParser("")
    add_method_args(parser)
    with pytest.raises(UserError, match="--adaptive .* --sampler euler"):
        check_method(parser.parse_args(["--sampler", "euler", "--adaptive", "1"]))


def test_a_network_that_sees_gamma_is_sampled_over_time_alone():
    settings = NetworkSettings("EqM-Ti/4", 8, 3, 2, uncond=False)
    config, request = Config(settings, ("a", "b"), None, {}), PlanRequest(StartRequest(0, 2))
    with pytest.raises(UserError, match="--no-uncond.*add --sampler euler"):
        make_plan(request, Method("gd"), config, (3, 8, 8), None)
    plan = make_plan(request, Method("euler"), config, (3, 8, 8), None)
    assert [plan.caption(i) for i in range(3)] == ["a", "b", "a"]


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_an_adaptive_sample_is_the_same_alone_and_in_a_batch_before_rounding(cfg_scale):
    network = random_network(FallingField)
    plan = Plan([0, 1, 2, 0, 2], [], Starts(3, network.input_shape))

    def sample(threshold: float, *batches: range) -> dict[int, Finished]:
        method = Method(stepsize=0.01, steps=50, threshold=threshold, cfg_scale=cfg_scale)
        sampler = Sampler(method, network, plan, seconds_per_frame=0.12, batch=max(map(len, batches)))
        groups = sampler.samples(batches, trace=False, progress=lambda evaluations: None)
        return {finished.index: finished for group in groups for finished in group}

    norms = sorted(norm for finished in sample(1e-9, range(8)).values() for (norm,) in finished.measured)
    half = norms[len(norms) // 4 : len(norms) * 3 // 4]
    _, low, high = max((high - low, low, high) for low, high in zip(half, half[1:], strict=False))
    threshold = (low + high) / 2  # as far from all norms as can be: rounding decides nothing
    together = sample(threshold, range(4), range(4, 8))
    assert len({finished.evaluations for finished in together.values()}) > 2
    alone = [[range(i, i + 1)] for i in range(8)]
    of_two_processes = [[range(rank, 8, 2)] for rank in range(2)]
    for batches in (*alone, *of_two_processes, [range(8)]):
        for i, finished in sample(threshold, *batches).items():
            assert finished.evaluations == together[i].evaluations
            torch.testing.assert_close(finished.x, together[i].x, atol=1e-4, rtol=0)


def test_as_many_updates_are_made_as_asked_for():
    class ConstantField(EqM):
        def field(self, x: torch.Tensor, *modulations: torch.Tensor, seconds_per_frame: float) -> torch.Tensor:
            return torch.ones_like(x)

    network = ConstantField(8, 4, 3, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    plan = Plan([0], [], Starts(3, (3, 8, 8)))
    sampler = Sampler(Method(stepsize=0.01), network, plan, seconds_per_frame=0.1, batch=1)
    x = sampler.descend([5], sampler.starts([5]), range(7))
    torch.testing.assert_close(x, sample_noise(3, [5], (3, 8, 8)) + 7 * 0.01)


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("uncond", [False, True], ids=["sees γ", "does not"])
def test_euler_takes_equal_steps_over_time_with_the_velocity_that_the_field_was_learnt_from(cfg_scale, uncond):
    network = random_network(EqM, uncond=uncond)
    plan = Plan([0, 1, 2], [], Starts(3, network.input_shape, objective=Objective(a=0.3, scale=2.0)))
    sampler = Sampler(Method("euler", steps=5, cfg_scale=cfg_scale), network, plan, 0.12, batch=4)
    counted = iter(range(9))
    found = sampler.descend(range(4), sampler.starts(range(4)), counted)
    assert len(list(counted)) == 3, "five steps, and one look for another"
    x, y = plan.starts(range(4)), plan.labels(range(4))
    for gamma, c in ((0.0, 2.0), (0.2, 2.0), (0.4, 2 * 0.6 / 0.7), (0.6, 2 * 0.4 / 0.7), (0.8, 2 * 0.2 / 0.7)):
        given, null = (network(x, torch.full((4,), gamma), labels, 0.12) for labels in (y, torch.full_like(y, 3)))
        x = x + 0.2 * (null + cfg_scale * (given - null)) / c
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def finished(indices: Iterable[int]) -> list[Finished]:
    return [Finished(index, torch.zeros(3, 4, 16, 16), 5, [[0.1]]) for index in indices]


@pytest.mark.parametrize("suffix", [".png", ".mp4", ".gif"])
def test_samples_that_cannot_be_written_are_one_line(tmp_path, suffix):
    clips = torch.zeros(2, 4, 16, 16, 3, dtype=torch.uint8)
    with Writer(Output(tmp_path / "gone", suffix, 8.0)) as writer:
        writer.take(finished(range(2)), torch.zeros(2, 3), clips)
        with pytest.raises(UserError, match="gone: No such file or directory") as error:
            writer.finish()
    assert "\n" not in str(error.value)


def test_samples_are_written_and_logged_whatever_the_number_of_groups(tmp_path):
    with Writer(Output(tmp_path, ".png", None)) as writer:
        for first in range(0, 14, 2):
            group = finished([first + 1, first])
            clips = torch.tensor([first + 1, first], dtype=torch.uint8)[:, None, None, None, None]  # (N, 1, 1, 1, 1)
            writer.take(group, torch.zeros(2, 3), clips.expand(2, 1, 16, 16, 3))
        log = writer.finish()
    assert sorted(log.descents) == list(range(14))
    for index in range(14):
        assert read_png(tmp_path / f"{index:06d}.png").max() == index


def test_a_group_is_read_once_the_next_one_is_under_way(tmp_path, monkeypatch):
    read = []

    def read_later(values: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: read.append(values) or values

    monkeypatch.setattr(outputs, "read_later", read_later)
    with Writer(Output(tmp_path, ".png", None)) as writer:
        for group in range(3):
            writer.take(finished([group]), torch.zeros(1, 3), torch.zeros(1, 1, 8, 8, 3).byte())
            assert len(read) == 2 * group
        writer.finish()
    assert len(read) == 2 * 3


def test_samples_that_are_not_finite_are_an_error_that_says_what_to_do(tmp_path):
    with Writer(Output(tmp_path, ".png", None)) as writer, pytest.raises(UserError, match="not finite: lower --steps"):
        for first in (0, 2):
            writer.take(finished([first, first + 1]), torch.full((2, 3), torch.nan), torch.zeros(2, 1, 8, 8, 3).byte())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_share_the_samples_in_batches_of_their_part(monkeypatch, ranks):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    done = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = batches_of_rank(num_samples=20, global_batch=6)
        assert max(map(len, batches)) <= 6 // ranks
        assert len(batches) == -(-sum(map(len, batches)) // (6 // ranks))
        done += [index for batch in batches for index in batch]
    assert sorted(done) == list(range(20))


def test_images_are_png_files_and_one_npz_beside_the_folder(image_checkpoint, tmp_path):
    folder = sampled(image_checkpoint, tmp_path, "--num-fid-samples", 3, "--class", "red")
    assert sorted(path.name for path in folder.iterdir()) == ["000000.png", "000001.png", "000002.png", "samples.csv"]
    images = np.load(tmp_path / "out.npz")["arr_0"]
    assert images.shape == (3, 16, 16, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images[1], np.asarray(Image.open(folder / "000001.png")))


def test_the_current_folder_can_take_the_samples(checkpoint, tmp_path):
    (tmp_path / "here").mkdir()
    flags = ["--ckpt", checkpoint, "--folder", ".", "--num-fid-samples", 1, *STEPS]
    run = run_script("sample_gd.py", *flags, cwd=tmp_path / "here")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "here" / "000000.mp4").exists()
    assert (tmp_path / "here-sheet.png").exists()


def test_samples_that_are_not_finite_are_an_error(lively_checkpoint, tmp_path):
    flags = ["--ckpt", lively_checkpoint, "--num-fid-samples", 1, "--stepsize", 1e38, *STEPS]
    run = run_script("sample_gd.py", *flags, cwd=tmp_path)
    assert run.returncode == 1
    assert "samples are not finite: lower --stepsize" in run.stderr
    assert "Traceback" not in run.stderr


# Some samples of the lively checkpoint stop on the way, at different steps, and some come to the cap.
ADAPTIVE = ["--num-fid-samples", 5, "--stepsize", 0.05, "--num-sampling-steps", 12, "--adaptive", 11.15]


@pytest.fixture(scope="module")
def adaptive_samples_of_three_slots(lively_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adaptive")
    return sampled(lively_checkpoint, folder, *ADAPTIVE, "--global-batch-size", 3, "--trace")


@pytest.mark.parametrize(("batch", "processes"), [(1, 0), (4, 2)])
def test_adaptive_videos_do_not_depend_on_batch_size_or_number_of_processes(
    lively_checkpoint, adaptive_samples_of_three_slots, tmp_path, batch, processes
):
    folder = sampled(lively_checkpoint, tmp_path, *ADAPTIVE, "--global-batch-size", batch, processes=processes)
    assert_same_frames(folder, adaptive_samples_of_three_slots)
    assert_same_tables(rows(folder), rows(adaptive_samples_of_three_slots))


def read_trace(folder: Path) -> dict[int, list[float]]:
    """The norms by step of each sample that is traced."""
    with folder.with_name(folder.name + "-trace.csv").open() as file:
        table = list(csv.DictReader(file))
    assert all(np.isfinite(float(row["energy"])) for row in table)
    samples = sorted({int(row["sample"]) for row in table})
    traces = {i: [(int(row["step"]), float(row["norm"])) for row in table if int(row["sample"]) == i] for i in samples}
    assert all([step for step, _ in trace] == list(range(1, len(trace) + 1)) for trace in traces.values())
    return {i: [norm for _, norm in trace] for i, trace in traces.items()}


def test_the_table_and_the_trace_say_when_each_sample_stopped(adaptive_samples_of_three_slots):
    folder = adaptive_samples_of_three_slots
    table, traces = rows(folder), read_trace(folder)
    counts = [int(row["evaluations"]) for row in table]
    assert len(set(counts)) > 2
    assert max(counts) == 12
    for index, (row, count) in enumerate(zip(table, counts, strict=True)):
        trace = traces[index]
        assert len(trace) == count
        assert float(row["final_norm"]) == pytest.approx(trace[-1], rel=1e-3)
        assert (trace[-1] < 11.15) == (count < 12)
        assert min(trace[:-1]) >= 11.15
        assert row["adaptive"] == "11.15"
    for name in ("norm", "energy"):
        with Image.open(folder.with_name(f"out-trace-{name}.png")) as plot:
            assert plot.width > 500


def test_the_trace_of_fixed_steps_has_the_first_samples_only(image_checkpoint, tmp_path):
    folder = sampled(image_checkpoint, tmp_path, "--num-fid-samples", 10, "--global-batch-size", 4, "--trace")
    traces, table = read_trace(folder), rows(folder)
    assert {i: len(trace) for i, trace in traces.items()} == dict.fromkeys(range(8), 3)
    assert [row["evaluations"] for row in table] == ["3"] * 10
    for row in table[:8]:
        assert float(row["final_norm"]) == pytest.approx(traces[int(row["index"])][-1], rel=1e-3)
    assert {row["adaptive"] for row in table} == {""}


def test_the_end_says_what_stopping_saved_when_some_ranks_have_no_sample(checkpoint, tmp_path):
    flags = ["--ckpt", checkpoint, "--num-fid-samples", 1, "--adaptive", 100, "--global-batch-size", 2]
    run = run_ranks(2, "sample_gd.py", *flags, "--num-sampling-steps", 4, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "evaluations a sample: mean 1, median 1, from 1 to 1; 0 of 1 came to the cap of 4; 75% fewer" in run.stdout


@pytest.mark.parametrize("threshold", ["0", "-1"])
def test_a_threshold_that_is_no_number_above_0_is_refused(checkpoint, tmp_path, threshold):
    run = run_script("sample_gd.py", "--ckpt", checkpoint, "--adaptive", threshold, cwd=tmp_path)
    assert run.returncode == 2
    assert f"error: argument --adaptive: '{threshold}' is not a number above 0" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "samples").exists()


def test_opening_a_checkpoint_draws_no_weights_and_leaves_torchs_compiler_alone(checkpoint, tmp_path):
    script = tmp_path / "open.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'EqM')!r})\n"
        "import torch\n"
        "from runs.load_network import load_network\n"
        "state = torch.get_rng_state()\n"
        f"load_network({str(checkpoint)!r})\n"
        "print(torch.equal(torch.get_rng_state(), state))\n"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])\n"
    )
    run = run_python(script, cwd=tmp_path)
    assert run.stdout == "True\n[]\n", run.stderr
