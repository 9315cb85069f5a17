"""What a run survives: stops and kills at any moment, damaged checkpoints, bad numbers, a full disk."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import ROOT, SMALL, WARM, environment_of, run_command, run_ranks, run_script
from runs.checkpoint import REQUIRED_KEYS, load_checkpoint, load_file, save_checkpoint
from runs.checkpoint_writer import CheckpointWriter, checkpoints
from runs.config import config_of
from runs.folder import run_folders
from runs.resume import Asked, claim_folder, find_start, newest_good
from runs.signals import ASKING, ONE_REQUEST_S, StopSignals
from runtime.errors import UserError
from runtime.files import lock
from runtime.random_numbers import seed_draws
from step import train_step
from test_train import assert_same, load, metrics
from test_training import BF16, FP16, FP32, RECIPE, kept, new_state, same
from warm_python import WarmProcess

NAME = "000-EqM-Ti-4-Linear-velocity-None"
TRAIN = ["train.py", *SMALL, "--num-workers", 0, "--log-every", 4, "--ckpt-every", 3]


@pytest.fixture(scope="module")
def straight(shapes, tmp_path_factory) -> Path:
    """A run of ten steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    run = run_script(*TRAIN, "--data-path", shapes, "--max-steps", 10, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder / "results" / NAME


def assert_ends_as(run: Path, straight: Path, step: int = 10) -> None:
    """Bitwise the same final state, and the same lines of losses."""
    ours, right = load(run, step), load(straight, step)
    assert ours.keys() == right.keys()
    for key in ours.keys() - {"config"}:
        assert_same(ours[key], right[key])
    lines = [
        [(row["step"], row["loss"], row["grad_norm"], row["largest_grad_norm"]) for row in metrics(folder)]
        for folder in (run, straight)
    ]
    assert lines[0] == lines[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["", "--use-bf16", "--use-amp"])
def test_a_deterministic_run_on_a_gpu_ends_bitwise_the_same_after_a_stop(shapes, tmp_path, precision):
    for name, stops in (("straight", [24]), ("resumed", [11, 24])):
        for step in stops:
            flags = [*precision.split(), "--deterministic", "--global-batch-size", 8, "--max-steps", step, "--resume"]
            script = [sys.executable, ROOT / "EqM" / TRAIN[0], *TRAIN[1:]]
            (tmp_path / name).mkdir(exist_ok=True)
            run = run_command(*script, "--data-path", shapes, *flags, cwd=tmp_path / name, gpu="0")
            assert run.returncode == 0, run.stderr
            assert "running" not in run.stdout  # eagerly, or without a graph
    ours, right = (load(tmp_path / name / "results" / NAME, 24) for name in ("resumed", "straight"))
    for key in ours.keys() - {"config"}:
        assert_same(ours[key], right[key])


def start_script(*arguments: object, cwd: Path) -> WarmProcess | subprocess.Popen:
    """As `start_python`, in a process that has imported torch already."""
    environment = environment_of()
    if not WARM.fits(environment):
        return start_python(*arguments, cwd=cwd)
    script, *others = arguments
    streams = [tempfile.TemporaryFile()]  # noqa: SIM115
    return WARM.start(ROOT / "EqM" / script, *others, cwd=cwd, environment=environment, streams=streams)


def start_python(*arguments: object, cwd: Path, launcher: tuple = ()) -> subprocess.Popen:
    """A script in a process group of its own, as a shell starts it."""
    command = [sys.executable, *launcher, ROOT / "EqM" / arguments[0], *arguments[1:]]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment_of(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(folder: Path, step: int, process: WarmProcess | subprocess.Popen) -> None:
    path, end = folder / "results" / NAME / "metrics.jsonl", time.monotonic() + 60
    while not (path.exists() and any(json.loads(line)["step"] >= step for line in path.read_text().splitlines())):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def skip_if_ignored(number: signal.Signals) -> None:
    """Under nohup the tests' processes inherit that hangups are ignored, as a training then should."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here")


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGHUP, 2), (signal.SIGUSR1, 0)]
)
def test_a_signal_ends_the_step_saves_and_exits_with_75_and_resume_goes_on(shapes, tmp_path, straight, number, workers):
    skip_if_ignored(number)
    command = ["train.py", *SMALL, "--data-path", shapes, "--log-every", 1, "--resume", "--num-workers", workers]
    start = start_python if number == signal.SIGTERM else start_script
    process = start(*command, cwd=tmp_path)
    wait_for_step(tmp_path, 3, process)
    os.killpg(process.pid, number)  # a terminal signals the loading processes too
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert f"WARNING stopping after this step: {number.name}" in said
    assert f"stopped: results/{NAME}; --resume (in place of --ckpt) goes on" in said
    assert "Traceback" not in said
    run = tmp_path / "results" / NAME
    (saved,) = checkpoints(run)
    stopped_at = int(saved.stem)
    assert metrics(run)[-1]["step"] in (stopped_at - 1, stopped_at)

    again = run_script(*command, "--max-steps", stopped_at + 2, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"going on from results/{NAME}/checkpoints/{saved.name}" in again.stdout
    assert [row["step"] for row in metrics(run)] == list(range(1, stopped_at + 3))
    assert len(list((tmp_path / "results").iterdir())) == 1
    finished = run_script(*command, "--max-steps", stopped_at + 2, cwd=tmp_path)
    assert finished.returncode == 0
    assert f"finished: results/{NAME} is at step {stopped_at + 2}" in finished.stdout


def test_a_run_under_nohup_heeds_no_hangup(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = StopSignals()
        heeded = {each for each in ASKING if signal.getsignal(each) == signals.note}
        signals.close()
        assert heeded == set(ASKING) - {signal.SIGHUP}
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_torchrun_passes_on_hangups_and_the_signals_that_it_is_told_to(shapes, tmp_path, number):
    skip_if_ignored(number)
    told = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1"]
    command = ["train.py", *SMALL, "--data-path", shapes, "--log-every", 1]
    process = start_python(*command, cwd=tmp_path, launcher=(*TORCHRUN, *told))
    wait_for_step(tmp_path, 3, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=90)
    assert len(checkpoints(tmp_path / "results" / NAME)) == 1, said
    assert f"stopped: results/{NAME}" in said


@pytest.mark.parametrize(
    "launcher", [(), pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["one process", "torchrun"]
)
def test_a_signal_while_the_network_is_compiled_ends_a_run_at_once_and_resume_begins_it(shapes, tmp_path, launcher):
    command = ["train.py", *SMALL, "--data-path", shapes, "--log-every", 1, "--resume", "--max-steps", 2]
    process = start_python(*command, "--compile", cwd=tmp_path, launcher=launcher)
    log, end = tmp_path / "results" / NAME / "log.txt", time.monotonic() + 60
    while not (log.exists() and "compiling the network" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (75 if not launcher else 1), said
    assert "stopped before the first step, with nothing to save: SIGTERM" in said
    assert "compiled in" not in said
    assert not checkpoints(tmp_path / "results" / NAME)

    again = run_script(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in metrics(tmp_path / "results" / NAME)] == [1, 2]


def test_a_second_signal_ends_a_run_at_once(shapes, tmp_path):
    process = start_script("train.py", *SMALL, "--data-path", shapes, "--log-every", 1, cwd=tmp_path)
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # in the first step after, or in the saving
    time.sleep(ONE_REQUEST_S + 0.2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    "everyone", [pytest.param(False, marks=pytest.mark.slow), True], ids=["torchrun alone", "every process"]
)
def test_torchrun_that_is_asked_to_stop_saves_first(shapes, tmp_path, everyone):
    command = ["train.py", *SMALL, "--data-path", shapes, "--log-every", 1]
    process = start_python(*command, cwd=tmp_path, launcher=TORCHRUN)
    wait_for_step(tmp_path, 3, process)
    for pid in [*(children(process.pid) if everyone else []), process.pid]:
        os.kill(pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    (saved,) = checkpoints(tmp_path / "results" / NAME)
    assert load_checkpoint(saved)["step"] == int(saved.stem)
    assert f"stopped: results/{NAME}" in said


def children(pid: int) -> list[int]:
    """Processes that a process started and that run training."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "train.py"], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_a_process_that_was_killed_and_is_restarted_goes_on_in_its_launchers_folder(shapes, tmp_path, monkeypatch):
    """Without torchrun, which takes half a minute to restart its processes."""
    other = tmp_path / "results" / "007-EqM-Ti-4-Linear-velocity-None"
    (other / "checkpoints").mkdir(parents=True)  # another run, which a restart must leave alone
    command = [*TRAIN, "--data-path", shapes, "--log-every", 1, "--max-steps", 20]
    run = tmp_path / "results" / "008-EqM-Ti-4-Linear-velocity-None"
    with start_script(*command, cwd=tmp_path) as process:
        end = time.monotonic() + 60
        while len(checkpoints(run)) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.kill()
        process.wait()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = run_script(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    monkeypatch.undo()
    (tmp_path / "straight").mkdir()
    assert run_script(*command, cwd=tmp_path / "straight").returncode == 0
    assert_ends_as(run, tmp_path / "straight" / "results" / NAME, 20)
    assert sorted(path.name[:3] for path in (tmp_path / "results").iterdir()) == ["007", "008"]


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_from_the_last_checkpoint(shapes, tmp_path):
    other = tmp_path / "results" / "007-EqM-Ti-4-Linear-velocity-None"
    (other / "checkpoints").mkdir(parents=True)  # another run, which a restart must leave alone
    command = [*TRAIN, "--data-path", shapes, "--log-every", 1, "--max-steps", 60]
    process = start_python(*command, cwd=tmp_path, launcher=(*TORCHRUN, "--max-restarts=1"))
    run = tmp_path / "results" / "008-EqM-Ti-4-Linear-velocity-None"
    end = time.monotonic() + 60
    while len(checkpoints(run)) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "going on from" in said
    (tmp_path / "straight").mkdir()
    assert run_ranks(2, *command, cwd=tmp_path / "straight").returncode == 0
    assert_ends_as(run, tmp_path / "straight" / "results" / NAME, 60)
    assert sorted(path.name[:3] for path in (tmp_path / "results").iterdir()) == ["007", "008"]


def test_a_run_resumed_by_another_number_of_ranks_sees_the_same_samples(shapes, tmp_path, straight):
    folder = tmp_path / "a"
    folder.mkdir()
    command = [*TRAIN, "--data-path", shapes, "--resume"]
    assert run_script(*command, "--max-steps", 6, cwd=folder).returncode == 0
    run = run_ranks(2, *command, "--max-steps", 10, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert "WARNING processes was 1 and is 2" in run.stdout
    ours, right = load(folder / "results" / NAME, 10), load(straight, 10)
    assert (ours["samples"], ours["epoch"]) == (right["samples"], right["epoch"])


def test_a_run_resumed_in_another_precision_or_with_other_flags_says_so(shapes, tmp_path):
    command = [*TRAIN, "--data-path", shapes, "--resume"]
    assert run_script(*command, "--max-steps", 3, cwd=tmp_path).returncode == 0
    (path,) = checkpoints(tmp_path / "results" / NAME)
    contents = load_checkpoint(path)
    contents["config"]["precision"]["name"] = "fp16"
    save_checkpoint(path, contents)
    run = run_script(*command, "--max-steps", 6, "--lr", 2e-4, "--global-batch-size", 4, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for said in (
        "trained in fp16; this run goes on in fp32",
        "--lr was 0.0001 and is 0.0002",
        "batch_size was 8 and is 4",
    ):
        assert said in run.stdout


def test_damaged_checkpoints_are_named_and_the_one_before_is_taken(shapes, tmp_path, straight):
    command = [*TRAIN, "--data-path", shapes, "--resume"]
    assert run_script(*command, "--max-steps", 9, cwd=tmp_path).returncode == 0
    run = tmp_path / "results" / NAME
    newest, middle, _ = checkpoints(run)
    newest.write_bytes(newest.read_bytes()[:-5])
    damaged = bytearray(middle.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    middle.write_bytes(damaged)
    again = run_script(*command, "--max-steps", 10, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "0000009.pt is cut short or has been changed: passed over" in again.stdout
    assert "0000006.pt has changed since it was written: passed over" in again.stdout
    assert f"going on from results/{NAME}/checkpoints/0000003.pt" in again.stdout
    assert_ends_as(run, straight)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_in_its_folder(shapes, tmp_path, straight):
    run = tmp_path / "results" / NAME
    run.mkdir(parents=True)  # killed before anything was written
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo')
    again = run_script(*TRAIN, "--data-path", shapes, "--resume", "--max-steps", 10, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert_ends_as(run, straight)


def test_resume_goes_on_with_the_newest_run_of_the_same_model_alone(shapes, tmp_path):
    for name in ("001-EqM-S-4", "010-EqM-Ti-4", "009-EqM-Ti-4", "011-EqM-Ti-8"):
        (tmp_path / "results" / f"{name}-Linear-velocity-None").mkdir(parents=True)
    run = run_script(*TRAIN, "--data-path", shapes, "--resume", "--max-steps", 1, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "results" / "010-EqM-Ti-4-Linear-velocity-None" / "checkpoints" / "0000001.pt").is_file()


@pytest.mark.parametrize("damage", ["cut", "a folder"])
def test_a_run_without_a_good_checkpoint_is_not_begun_anew_over_them(shapes, tmp_path, damage):
    command = [*TRAIN, "--data-path", shapes, "--resume"]
    assert run_script(*command, "--max-steps", 2, cwd=tmp_path).returncode == 0
    (path,) = checkpoints(tmp_path / "results" / NAME)
    contents = path.read_bytes()[:-1]
    path.unlink()
    path.mkdir() if damage == "a folder" else path.write_bytes(contents)
    run = run_script(*command, "--max-steps", 4, cwd=tmp_path)
    assert run.returncode == 1
    assert str(path.relative_to(tmp_path)) in run.stderr
    assert "move the run away" in run.stderr
    assert path.is_dir() or path.read_bytes() == contents
    assert metrics(path.parent.parent)[-1]["step"] == 2


def test_two_processes_do_not_train_in_one_folder(shapes, tmp_path, monkeypatch):
    run = tmp_path / "results" / NAME
    run.mkdir(parents=True)
    assert lock(run)
    monkeypatch.setattr("runs.resume.LOCK_PATIENCE_S", 0)
    with pytest.raises(UserError, match="another process trains in"):
        find_start(
            Asked(
                tmp_path / "results", resume=True, checkpoint=None, given={}, new_name="EqM-Ti-4-Linear-velocity-None"
            )
        )


def test_of_runs_that_found_nothing_to_go_on_with_one_makes_a_folder(checkpoint, tmp_path, monkeypatch):
    def look_and_linger(results_dir: Path) -> list[Path]:
        found = run_folders(results_dir)
        time.sleep(0.05)
        return found

    monkeypatch.setattr("runs.resume.run_folders", look_and_linger)
    config = config_of(load_checkpoint(checkpoint)["config"], checkpoint)
    asked = Asked(tmp_path / "results", True, None, {"model": "EqM-Ti/4"}, NAME[4:])
    start = find_start(asked)
    assert not (start.folder or start.checkpoint)

    def claim(_: int) -> str:
        try:
            return str(claim_folder(start, asked, config))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        folder, *others = sorted(pool.map(claim, range(8)), key=len)
    assert folder == str(tmp_path / "results" / NAME)
    assert others == [f"another process has just begun to train in {folder}: let it end, or stop it"] * 7
    assert [path.name for path in (tmp_path / "results").iterdir()] == [NAME]
    other = replace(asked, given={"model": "EqM-S/4"}, new_name="EqM-S-4-Linear-velocity-None")
    assert claim_folder(start, other, config).name == NAME.replace("000", "001")
    assert claim_folder(start, replace(asked, resume=False), config).name == NAME.replace("000", "002")


@pytest.mark.slow
def test_of_three_runs_that_start_at_once_one_trains_and_the_others_say_so(shapes, tmp_path):
    command = [*TRAIN, "--data-path", shapes, "--resume", "--log-every", 1, "--max-steps", 10**6]
    with ExitStack() as stack:
        processes = [stack.enter_context(start_script(*command, cwd=tmp_path)) for _ in range(3)]
        end = time.monotonic() + 100
        while sum(process.poll() is None for process in processes) > 1:
            assert time.monotonic() < end
            time.sleep(0.02)
        (winner,) = [process for process in processes if process.poll() is None]
        wait_for_step(tmp_path, 1, winner)
        for process in processes:
            if process is not winner:
                assert process.returncode == 1
                assert re.search(f"another process .*trains? in results/{NAME}", process.communicate()[0])
        assert [path.name for path in (tmp_path / "results").iterdir()] == [NAME]


@pytest.mark.parametrize("change", [{}, {"dispersion": 0.5}], ids=["the same", "other"])
def test_a_run_without_a_checkpoint_does_not_hide_the_one_before(checkpoint, tmp_path, monkeypatch, change):
    """Where the two differ in a setting that is not given, nobody knows which one is meant."""
    monkeypatch.setattr("runs.resume.lock", lambda folder: True)  # this process starts twice
    before, newest = tmp_path / NAME, tmp_path / NAME.replace("000", "001")
    shutil.copytree(checkpoint.parent.parent, before)
    newest.mkdir()
    config = json.loads((before / "config.json").read_text())
    config["objective"] |= change
    (newest / "config.json").write_text(json.dumps(config))
    asked = Asked(tmp_path, resume=True, checkpoint=None, given={"model": "EqM-Ti/4"})
    if change:
        with pytest.raises(UserError, match=f"{newest} has no checkpoint, and {before} has, with --disp False"):
            find_start(asked)
    else:
        start = find_start(asked)
        assert (start.folder, start.checkpoint) == (before, before / "checkpoints" / "0000004.pt")
        assert start.notes == [f"{newest} has no checkpoint: going on with {before}, which has the same settings"]
    assert find_start(replace(asked, given={"disp": bool(change)})).folder == (newest if change else before)


def test_resume_and_ckpt_together_are_refused(shapes, checkpoint, tmp_path):
    run = run_script(*TRAIN, "--data-path", shapes, "--resume", "--ckpt", checkpoint, cwd=tmp_path)
    assert run.returncode == 2
    assert "not allowed with argument" in run.stderr


def damaged_copies(checkpoint: Path, folder: Path, count: int, flip: bool) -> list[Path]:
    whole, rng, paths = checkpoint.read_bytes(), random.Random(0), []
    for i in range(count):
        changed, paths = bytearray(whole), [*paths, folder / f"{i}.pt"]
        if flip:
            changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            # Half of them near the end, where the index and the checksum are.
            del changed[rng.randrange(len(whole)) if i % 2 else len(whole) - 1 - rng.randrange(200) :]
        paths[-1].write_bytes(changed)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("flip", [False, True], ids=["cut", "one bit"])
def test_two_hundred_damaged_checkpoints_are_all_refused_by_name(checkpoint, tmp_path, flip):
    for path in damaged_copies(checkpoint, tmp_path, 200, flip):
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_file(path)
        path.unlink()


def test_every_bit_of_the_checksum_and_the_index_is_guarded(tmp_path):
    save_checkpoint(tmp_path / "whole.pt", dict.fromkeys(REQUIRED_KEYS) | {"x": torch.arange(3)})
    whole = (tmp_path / "whole.pt").read_bytes()
    for place in range(len(whole) - 120, len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 4
        (tmp_path / "changed.pt").write_bytes(changed)
        with pytest.raises(UserError, match="changed.pt"):
            load_file(tmp_path / "changed.pt")
    assert load_file(tmp_path / "whole.pt")["x"].tolist() == [0, 1, 2]


def test_a_checkpoint_is_a_plain_archive_that_torch_and_zip_read(checkpoint):
    assert torch.load(checkpoint, weights_only=True)["step"] == 4
    assert torch.load(checkpoint, weights_only=True, mmap=True)["step"] == 4
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.testzip() is None
        assert re.fullmatch(rb"EqM crc32 [0-9a-f]{8}", archive.comment)


def as_copied(copied: dict, problem: Exception | None) -> dict:
    """What a single rank writes of contents that hold no shares."""
    assert problem is None
    return copied


@pytest.mark.parametrize("keep", [1, 2, None])
def test_the_newest_good_checkpoints_are_kept(tmp_path, keep):
    (tmp_path / "checkpoints").mkdir()
    writer = CheckpointWriter(tmp_path, keep, None, as_copied)
    for step in (1, 2, 3):
        writer.save({"config": {}, "step": step, "x": torch.full((2,), step)})
    writer.finish()
    kept = [int(path.stem) for path in checkpoints(tmp_path)]
    assert kept == [3, 2, 1][:keep]
    assert [load_file(path)["x"].tolist() for path in checkpoints(tmp_path)] == [[step] * 2 for step in kept]


def test_a_damaged_checkpoint_is_not_counted_among_those_to_keep(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    first = CheckpointWriter(tmp_path, None, None, as_copied)
    for step in (1, 2, 3):
        first.save({"config": {}, "step": step})
    first.finish()
    (tmp_path / "checkpoints" / "0000003.pt").write_bytes(b"damaged")
    (tmp_path / "checkpoints" / "notes.pt").write_text("mine")
    second = CheckpointWriter(tmp_path, 2, newest_good(tmp_path)[0], as_copied)
    second.save({"config": {}, "step": 4})
    second.finish()
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["0000002.pt", "0000003.pt", "0000004.pt", "notes.pt"]


def test_older_checkpoints_are_not_read_where_all_are_kept(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path / "checkpoints" / "0000001.pt", {"config": {}, "step": 1})
    monkeypatch.setattr("runs.checkpoint_writer.is_sealed", lambda path: pytest.fail(f"{path} was read"))
    writer = CheckpointWriter(tmp_path, None, None, as_copied)
    writer.save({"config": {}, "step": 2})
    writer.finish()
    assert [path.name for path in checkpoints(tmp_path)] == ["0000002.pt", "0000001.pt"]


def test_a_checkpoint_is_of_the_moment_at_which_it_was_saved(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    writer, value = CheckpointWriter(tmp_path, None, None, as_copied), torch.zeros(1000)
    view = value[:10]
    for step in range(5):
        value.fill_(step)
        writer.save({"config": {}, "step": step, "deep": {"x": view}})
        value.fill_(99)
    writer.finish()
    for path in checkpoints(tmp_path):
        contents = load_file(path)
        assert contents["deep"]["x"].tolist() == [contents["step"]] * 10
        assert path.stat().st_size < 2000  # not all that the view looks at


BAD = {
    "noise in fp32": (FP32, float("nan")),
    "overflow in fp16": (FP16, 1e6),
    "infinity in fp32": (FP32, float("inf")),
    "noise in bf16": (BF16, float("nan")),
}


@pytest.mark.parametrize(("precision", "bad"), BAD.values(), ids=BAD.keys())
def test_batches_with_bad_numbers_are_as_if_they_were_never_seen(precision, bad):
    """Every tenth of 200 batches is bad; the other run does not get it, but has its scale halved."""
    ours, right = new_state(precision), new_state(precision)
    x, y, seconds = torch.rand(4, 3, 4, 8, 8) * 2 - 1, torch.arange(4), torch.full((4,), 0.1)
    for i in range(200):
        is_bad = i % 10 == 9
        for state in (ours, right):
            if is_bad and state is right:
                if state.scaler.is_enabled():
                    state.scaler.update(state.scaler.get_scale() / 2)
                continue
            seed_draws(state.generator, 0, i)
            train_step(state, RECIPE, x * bad if is_bad else x, y, seconds)
            state.advance(4)
            if i % 10 == 9 or i % 10 == 5:
                # A scale that 20 halvings would bring to the floor is set again.
                state.read_counts()
        if is_bad and ours.scaler.is_enabled():
            for state in (ours, right):
                state.scaler.update(2.0**12)
    assert ours.read_counts() + right.read_counts() == 0
    assert (ours.step, ours.skipped, right.step, right.skipped) == (180, 20, 180, 0)
    assert same(kept(ours), kept(right))
    assert torch.equal(ours.sums, right.sums)
    assert math.isfinite(ours.largest_norm)


def test_bad_steps_in_a_row_end_a_run_and_single_ones_do_not():
    state, x = new_state(), torch.rand(4, 3, 4, 8, 8)
    for in_a_row in (2, 3):
        for i in range(in_a_row + 1):
            seed_draws(state.generator, 0, i)
            train_step(state, RECIPE, x * (float("nan") if i else 1), torch.arange(4), torch.full((4,), 0.1))
            state.advance(4)
        state.read_counts()
        if in_a_row == 2:
            state.check_gradients(3, lambda: "ADVICE")
    with pytest.raises(UserError, match="not finite in 3 steps in a row, at step 2 in fp32; ADVICE: go on from there"):
        state.check_gradients(3, lambda: "ADVICE")


def test_an_isolated_explosion_shows_in_the_largest_gradient_norm():
    state, norms = new_state(), []
    for i in range(10):
        x = torch.rand(4, 3, 4, 8, 8, generator=torch.Generator().manual_seed(i)) * (300 if i == 4 else 1)
        seed_draws(state.generator, 0, i)
        norms.append(train_step(state, RECIPE, x, torch.arange(4), torch.full((4,), 0.1))[1].item())
    means = state.take_means().tolist()
    assert means[1:] == pytest.approx([sum(norms) / 10, max(norms)])
    assert max(norms) > 10 * sorted(norms)[-2]
    assert state.take_means()[2] == 0


def test_a_poisoned_run_ends_with_one_line_and_is_not_saved(shapes, tmp_path):
    flags = ["--lr", 1e20, "--max-steps", 50, "--log-every", 5, "--max-bad-steps", 3, "--ckpt-every", 1]
    run = run_script(*TRAIN, "--data-path", shapes, *flags, cwd=tmp_path)
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if "error:" in line]
    assert "not finite" in line
    assert "in fp32" in line
    saved = checkpoints(tmp_path / "results" / NAME)
    assert f"the last good checkpoint is {saved[0].relative_to(tmp_path)}" in line
    for path in saved:
        for part in ("model", "ema"):
            assert all(tensor.isfinite().all() for tensor in load_checkpoint(path)[part].values())


LIMITED = (
    "import resource, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, str({folder!r}))\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_a_disk_that_fills_up_is_named_and_keeps_the_checkpoints_that_are_there(shapes, tmp_path):
    """A checkpoint takes 30 MB, and no file may have more than 20."""
    command = [*TRAIN[1:], "--data-path", shapes, "--resume"]
    assert run_script("train.py", *command, "--max-steps", 3, cwd=tmp_path).returncode == 0
    limited = LIMITED.format(folder=str(ROOT / "EqM"))
    flags = [ROOT / "EqM" / "train.py", *command, "--max-steps", 8]
    run = run_command(sys.executable, "-c", limited, *flags, cwd=tmp_path)
    assert run.returncode == 1, run.stdout
    assert "Traceback" not in run.stderr
    folder = tmp_path / "results" / NAME
    assert f"the last good checkpoint is results/{NAME}/checkpoints/0000003.pt" in run.stderr
    assert "ERROR cannot save to" in run.stdout  # at step 6, after which training went on
    assert metrics(folder)[-1]["step"] == 8
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["0000003.pt"]
    again = run_script("train.py", *command, "--max-steps", 8, cwd=tmp_path)
    assert again.returncode == 0
    assert load(folder, 8)["step"] == 8


def test_lines_that_cannot_be_written_do_not_end_a_run(shapes, tmp_path, straight):
    run = tmp_path / "results" / NAME
    run.mkdir(parents=True)
    (run / "log.txt").symlink_to("/dev/full")
    (run / "metrics.jsonl").symlink_to("/lost/metrics.jsonl")
    done = run_script(*TRAIN, "--data-path", shapes, "--resume", "--max-steps", 10, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "metrics.jsonl lacks the line of step 4: No such file or directory" in done.stdout
    assert done.stderr.count("log.txt cannot be written") == 1
    assert "Traceback" not in done.stderr
    assert_same(load(run, 10)["model"], load(straight, 10)["model"])


def test_a_results_folder_that_is_lost_while_training_is_named(shapes, tmp_path):
    flags = ["--data-path", shapes, "--log-every", 1, "--ckpt-every", 9, "--epochs", 10**6]
    process = start_script("train.py", *SMALL, *flags, cwd=tmp_path)
    wait_for_step(tmp_path, 2, process)
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    assert "the folder is gone" in said


@pytest.mark.slow
def test_fifty_kills_at_random_moments_leave_runs_that_resume_to_the_same_bits(shapes, tmp_path):
    script = ROOT / "tests" / "kill_and_resume.py"
    run = run_command(sys.executable, script, shapes, tmp_path, "--kills", 50, cwd=tmp_path, timeout_s=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "50 of 50 runs ended bitwise equal" in run.stdout
    counts = dict(re.findall(r"killed (.*?): (\d+)", run.stdout))
    assert int(counts["before the first checkpoint"]) > 0
    assert int(counts["inside a checkpoint's write"]) > 0
    print(run.stdout)
