"""EqM/train.py as people run it."""

import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import av
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from compiled import EAGER
from conftest import ROOT, SMALL, run_command, run_ranks, run_script, run_torchrun
from data.batches import TrainingBatches, sample_limit
from data.clips import Samples
from data.form import Form
from data.latents import to_unit_range
from data.scan import scan_for_training
from data.source import Source
from network_settings import NetworkSettings
from objective import Objective
from precision import Precision
from runs.checkpoint_writer import CheckpointWriter
from runs.config import Config, config_of
from runs.folder import create_run_folder
from runs.record import Metrics
from runs.schedule import RunOptions
from runs.signals import StopSignals
from runs.trackers import Trackers
from runtime.random_numbers import seed_draws
from sampling.previews import Previews
from state import TrainingState
from step import Recipe, draw_random_numbers, training_step
from train import train

NAME = "000-EqM-Ti-4-Linear-velocity-None"


def trained(
    folder: Path, data: Path, *flags: object, processes: int = 0, launch: Callable[..., CompletedProcess] = run_ranks
) -> Path:
    """Trains in a folder, on clips of 16 pixels unless flags say otherwise, and returns the newest run's folder."""
    arguments = ["train.py", "--data-path", data, *SMALL, "--num-workers", 0, *flags]
    run = launch(processes, *arguments, cwd=folder) if processes else run_script(*arguments, cwd=folder)
    assert run.returncode == 0, run.stderr
    return max((folder / "results").iterdir())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def load(run: Path, step: int) -> dict:
    return torch.load(run / "checkpoints" / f"{step:07d}.pt", weights_only=True)


def assert_same(a: object, b: object) -> None:
    """Two nested structures of tensors and plain data are bitwise equal."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_a_run_leaves_log_metrics_config_and_checkpoints(shapes, tmp_path):
    flags = ["--use-bf16", "--max-steps", 5, "--ckpt-every", 2, "--log-every", 2, "--image-size", 16]
    run = trained(tmp_path, shapes, *flags)
    assert run.name == NAME
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0000002.pt", "0000004.pt", "0000005.pt"]
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    expected = {"step", "loss", "grad_norm", "lr", "samples_per_second", "memory_gb", "scaler_scale"}
    assert all(expected <= row.keys() for row in rows)
    assert json.loads((run / "config.json").read_text())["classes"] == [
        "CircleRight",
        "CircleUp",
        "SquareRight",
        "SquareUp",
    ]


def test_the_log_begins_with_what_a_person_needs_to_know_and_says_each_thing_once(checkpoint):
    log = (checkpoint.parent.parent / "log.txt").read_text()
    for said in ("device: CPU", "precision: fp32", "parameters", "16 clips, 4 classes", "tokens per sample: 32"):
        assert log.count(said) == 1
    assert "batch: 8 (the default on a CPU; on a GPU 256), 8 per rank" in log


def test_a_fallback_is_a_warning_in_log_config_and_checkpoint(shapes, tmp_path):
    run = trained(tmp_path, shapes, "--use-amp", "--max-steps", 1)
    (line,) = [line for line in (run / "log.txt").read_text().splitlines() if "precision:" in line]
    assert "WARNING precision: fp32 IEEE (fp16 requested: fp16 needs a CUDA GPU of capability 7.0 or higher" in line
    saved = load(run, 1)["config"]["precision"]
    assert (saved["name"], saved["requested"]) == ("fp32", "fp16")
    assert "CPU" in saved["reason"]


def test_a_checkpoint_is_plain_data_with_all_its_parts(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    assert {"model", "ema", "opt", "scaler", "step", "epoch", "samples", "config"} <= saved.keys()
    assert saved["step"] == 4
    assert (saved["samples"], saved["epoch"]) == (32, 2)
    assert saved["config"]["frames_per_second"] == pytest.approx(25 / 3)
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in saved["model"])


def test_a_run_that_is_stopped_and_resumed_ends_bitwise_as_one_that_was_not(shapes, tmp_path):
    straight = trained(tmp_path, shapes, "--max-steps", 5)
    stopped = trained(tmp_path, shapes, "--max-steps", 3)
    resumed = trained(tmp_path, shapes, "--max-steps", 5, "--ckpt", stopped / "checkpoints" / "0000003.pt")
    assert resumed.name.startswith("002-")
    expected, found = load(straight, 5), load(resumed, 5)
    for key in expected.keys() - {"config"}:
        assert_same(expected[key], found[key])
    assert metrics(straight)[-1]["step"] == metrics(resumed)[-1]["step"] == 5


def test_two_processes_share_the_batch_and_write_one_run(shapes, tmp_path):
    run = trained(tmp_path, shapes, "--max-steps", 2, "--use-bf16", processes=2, launch=run_torchrun)
    log = (run / "log.txt").read_text()
    assert "8 (the default on a CPU; on a GPU 256), 4 per rank" in log
    assert log.count("precision: fp32 IEEE (bf16 requested: rank 0:") == 1
    saved = load(run, 2)
    assert saved["samples"] == 16
    assert not any(name.startswith("module.") for name in saved["model"])
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_a_set_smaller_than_a_batch_goes_on_with_the_next_epoch(shapes, tmp_path):
    run = trained(tmp_path, shapes, "--max-steps", 2, "--global-batch-size", 24)
    saved = load(run, 2)
    assert (saved["samples"], saved["epoch"]) == (48, 3)


def test_epochs_end_a_run_without_max_steps(shapes, tmp_path):
    run = trained(tmp_path, shapes, "--epochs", 1, "--global-batch-size", 6)
    assert metrics(run)[-1]["step"] == 3  # 16 clips make two batches of 6 and one that ends in the next epoch


def test_max_steps_alone_lifts_the_default_limit_of_epochs():
    assert sample_limit(None, None, 10) == 800
    assert sample_limit(3, 10**6, 10) == 30
    assert sample_limit(None, 10**6, 10) > 10**9


def test_steps_are_updates_and_batches_that_the_scaler_skips_are_not_counted(shapes, tmp_path):
    found = scan_for_training(shapes, video=True)
    network = NetworkSettings("EqM-Ti/4", (4, 16, 16), 3, len(found.classes), temporal_patch=2)
    fp16, cpu = Precision("fp16", "fp16", torch.float16), torch.device("cpu")
    state = TrainingState(network.build(), fp16, cpu)
    torch.nn.init.normal_(state.working.final_layer.linear.weight, std=0.1)
    state.share.weights.copy_(state.working_weights)
    # Half the batches overflow: after each update the scale is doubled, over what fp16 can hold.
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=1)
    (tmp_path / "checkpoints").mkdir()
    form = Form(True, 16, clip_len=4, frame_interval=3, flip=True)
    batches = TrainingBatches(Source(form, found, None, None, None), 0, 0, 10**9, 4, 0, cpu)
    config = Config(network, found.classes, 25 / 3, fp16.as_dict(), global_batch_size=4)
    options = RunOptions(2, 3, None, None, math.inf, 20, last_step=5)
    step = training_step(state, Recipe(1e-4, 0, 0, 0.9999), 4, seed=0, speed=EAGER)
    previews = Previews(None, 4, state, config, None, tmp_path, Trackers())
    writer, record = CheckpointWriter(tmp_path, None, None, state.assemble), Metrics(tmp_path, cpu, 0, 0)
    signals = StopSignals()
    assert train(options, config, state, step, batches, record, previews, writer, signals)
    signals.close()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4, 5]
    assert lines[-1]["skipped"] == state.skipped >= 3
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0000003.pt", "0000005.pt"]
    assert (state.step, state.updates.item()) == (5, 5)
    assert (state.launched, state.samples) == (5 + state.skipped, 4 * (5 + state.skipped))
    assert load(tmp_path, 3)["opt"]["step"] == 3


@pytest.mark.parametrize(("share", "learnt"), [(0, False), (0.9, True)])
def test_class_dropout_decides_whether_the_null_class_is_learnt(shapes, tmp_path, share, learnt):
    run = trained(tmp_path, shapes, "--class-dropout", share, "--lr", 1e-3, "--max-steps", 8, "--ckpt-every", 7)
    first, last = (load(run, step)["model"]["y_embedder.embedding_table.weight"][-1] for step in (7, 8))
    assert torch.equal(first, last) != learnt


def test_max_minutes_end_a_run_with_a_checkpoint(shapes, tmp_path):
    run = trained(tmp_path, shapes, "--max-minutes", 0.0001, "--log-every", 1, processes=2)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["0000001.pt"]


def test_images_train_without_the_video_flag(tmp_path):
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 24), (level, level, i)).save(tmp_path / "images" / name / f"{i}.png")
    flags = ["--data-path", "images", "--image-size", 16, "--model", "EqM-Ti/4", "--max-steps", 2, "--num-workers", 1]
    run = run_script("train.py", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    saved = load(tmp_path / "results" / NAME, 2)
    assert saved["config"]["network"]["input_size"] == 16
    assert saved["config"]["classes"] == ["dark", "light"]


def test_an_unreadable_clip_is_skipped_counted_and_named(shapes, tmp_path):
    (tmp_path / "data").symlink_to(shapes.parent)
    many = tmp_path / "many"
    for i, clip in enumerate(sorted(shapes.glob("*/*.avi"))):
        (many / clip.parent.name).mkdir(parents=True, exist_ok=True)
        (many / clip.parent.name / clip.name).symlink_to(clip)
        if i == 0:
            (many / clip.parent.name / "v_Broken_g01_c01.avi").write_bytes(b"no video")
    run = trained(tmp_path, many, "--max-steps", 1)
    (line,) = [line for line in (run / "log.txt").read_text().splitlines() if "skipped unreadable" in line]
    assert "v_Broken_g01_c01.avi" in line
    assert "16 clips" in (run / "log.txt").read_text()


def test_a_file_that_only_training_finds_unreadable_is_named_and_counted_once(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    for i in range(15):
        noise.save(tmp_path / "images" / "a" / f"{i:02d}.png")
    noise.save(tmp_path / "whole.jpg")
    cut = (tmp_path / "whole.jpg").read_bytes()[:900]  # its header is whole, which is what the scan looks at
    (tmp_path / "images" / "a" / "cut.jpg").write_bytes(cut)
    flags = ["--data-path", "images", "--image-size", 16, "--model", "EqM-Ti/4", "--max-steps", 2]
    run = run_script("train.py", *flags, "--global-batch-size", 32, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("WARNING skipped unreadable images/a/cut.jpg") == 1
    assert [row["unreadable"] for row in metrics(tmp_path / "results" / NAME)] == [1, 1]


def test_runs_that_start_at_once_never_share_a_folder(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: create_run_folder(tmp_path / "results", "EqM-S/4"), range(64)))
    assert len(set(folders)) == 64
    assert sorted(folder.name for folder in folders)[-1] == "063-EqM-S-4-Linear-velocity-None"


def test_the_next_number_follows_the_largest_there(tmp_path):
    (tmp_path / "026-EqM-B-2-Linear-velocity-None").mkdir()
    (tmp_path / "notes").mkdir()
    assert create_run_folder(tmp_path, "EqM-S/4").name == "027-EqM-S-4-Linear-velocity-None"


def loss_on_clips(run: Path, clips: Path, step: int) -> float:
    """The loss on fixed clips and random numbers; before the first step the network's output is zero."""
    samples = Samples(scan_for_training(clips, video=True), Form(True, 64, 4, 3), seed=0)
    batch = default_collate([samples[0, i % len(samples.found)] for i in range(30)])
    x, seconds_per_frame = to_unit_range(batch["x"]), batch["seconds_per_frame"]
    generator = torch.Generator()
    seed_draws(generator, 99, 0, 0)
    noise, gamma, _ = draw_random_numbers(x, generator)
    if step == 0:
        return Objective().loss(lambda x_gamma, _: (torch.zeros_like(x_gamma), None), x, noise, gamma).item()
    saved = load(run, step)
    network = config_of(saved["config"], run).network.build().eval()
    network.load_state_dict(saved["model"])

    def field(x_gamma: torch.Tensor, gamma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return network(x_gamma, gamma, batch["label"], seconds_per_frame, with_tokens=True)

    with torch.no_grad():
        return Objective().loss(field, x, noise, gamma).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "steps", "less"),
    # On a CPU all three compute in fp32: one of them samples with all of the default's 250 steps.
    [("--use-bf16", 12, ""), ("--use-amp", 2, "--num-sampling-steps 10"), ("", 2, "--num-sampling-steps 10")],
)
@pytest.mark.parametrize("data", ["shapes", "real_clips"])
def test_the_guides_commands_work_as_written(request, tmp_path, data, precision, steps, less):
    clips = request.getfixturevalue(data)
    (tmp_path / "datasets" / "ucf-101").mkdir(parents=True)
    (tmp_path / "datasets" / "ucf-101" / "train").symlink_to(clips)
    (tmp_path / "EqM").symlink_to(ROOT / "EqM")

    def torchrun(command: str) -> str:
        launcher = [Path(sys.executable).with_name("torchrun"), "--nproc_per_node=1"]
        result = run_command(*launcher, *command.split(), cwd=tmp_path, threads=2, timeout_s=900)
        assert result.returncode == 0, result.stderr
        return result.stdout

    model = "--model EqM-S/4 --video --clip-len 4"
    torchrun(f"EqM/train.py --data-path datasets/ucf-101/train {model} {precision} --max-steps {steps}")
    run = tmp_path / "results" / "000-EqM-S-4-Linear-velocity-None"
    assert metrics(run)[-1]["step"] == steps
    assert loss_on_clips(run, clips, steps) < loss_on_clips(run, clips, step=0)
    checkpoint = f"{run.relative_to(tmp_path)}/checkpoints/{steps:07d}.pt"
    said = torchrun(
        f"EqM/sample_gd.py {model} --ckpt {checkpoint} --folder video_samples {precision} --num-fid-samples 1 {less}"
    )
    assert said.count("precision: fp32") == 1
    assert said.count("WARNING") == bool(precision)
    (video,) = (tmp_path / "video_samples").glob("*.mp4")
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4


def test_an_error_of_one_rank_ends_the_others_without_a_traceback(shapes, tmp_path):
    script = tmp_path / "one_rank_fails.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'EqM')!r})\n"
        "import torch\nfrom runtime import cli, distributed, errors\n"
        "def main():\n"
        "    distributed.start()\n"
        "    if distributed.rank() == int(sys.argv[1]):\n"
        "        raise errors.UserError('this rank alone failed')\n"
        "    distributed.mean(torch.zeros(1))\n"
        "cli.run(main, '')\n"
    )
    for launch, rank in ((run_ranks, 0), (run_torchrun, 1)):
        result = launch(2, script, rank, cwd=tmp_path)
        assert result.returncode != 0
        assert result.stderr.count("one_rank_fails.py: error: this rank alone failed") == 1
        assert "cli.py" not in result.stderr


def test_memory_is_the_process_s_own_not_that_of_the_one_that_started_it(tmp_path):
    """As getrusage has it on Linux: tests that compare such figures could not fail."""
    script = "from runs import record; print(record.process_memory_gb())"
    start = f"import subprocess, sys; held = b'x' * 2 * 10**9; subprocess.run([sys.executable, '-c', {script!r}])"
    run = run_command("env", f"PYTHONPATH={ROOT / 'EqM'}", sys.executable, "-c", start, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert 0.1 < float(run.stdout) < 1.5
