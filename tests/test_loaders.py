"""A loading process or a pack that is lost ends a training in one line, on every rank, with the state saved."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import ROOT, SMALL, make_pack, run_script
from runs.checkpoint_writer import checkpoints
from runtime.files import lock
from test_survive import NAME, TORCHRUN, start_python, start_script, wait_for_step

TRAIN = ["train.py", *SMALL, "--log-every", 1, "--resume"]


def workers_of(pid: int) -> list[int]:
    """The loading processes of a training: its forks."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def assert_ended(said: str, words: str, folder: Path, data: Path, *more: object) -> None:
    """One line, the state saved, and a run that goes on."""
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "train.py: error: " in line]
    assert words in line
    assert line.endswith("(the state is saved, and --resume goes on)")
    run = folder / "results" / NAME
    (saved,) = checkpoints(run)
    stopped_at = int(saved.stem)
    assert stopped_at >= 2
    command = [*TRAIN, "--data-path", data, "--max-steps", stopped_at + 1, *more]
    again = run_script(*command, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert f"going on from results/{NAME}/checkpoints/{saved.name}" in again.stdout


def test_a_loading_process_that_is_killed_ends_a_run_in_one_line_with_its_state_saved(shapes, tmp_path):
    with start_script(*TRAIN, "--data-path", shapes, "--num-workers", 2, cwd=tmp_path) as process:
        wait_for_step(tmp_path, 3, process)
        killed, other = workers_of(process.pid)
        os.kill(killed, signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 1, said
    assert_ended(
        said, "a loading process ended (SIGKILL), probably because memory ran out: lower --num-wor", tmp_path, shapes
    )
    assert not is_running(other)


def cut(pack: Path) -> None:
    for path in pack.glob("*.bin"):
        os.truncate(path, 100)


def write_over(pack: Path) -> None:
    """As `cp` of another pack of the same sizes."""
    for path in pack.glob("*.bin"):
        path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "workers", "words"),
    [
        (cut, 0, "has 100 bytes, not the 12,288 that it had: put the pack back, or run python EqM/prepare.py"),
        pytest.param(cut, 2, "has 100 bytes, not the 12,288 that it had", marks=pytest.mark.slow),
        pytest.param(write_over, 0, "has changed since the run began", marks=pytest.mark.slow),
    ],
)
def test_a_pack_that_is_cut_or_written_over_ends_a_run_in_one_line(shapes, tmp_path, damage, workers, words):
    make_pack(shapes, tmp_path / "pack")
    shutil.copytree(tmp_path / "pack", tmp_path / "whole")
    command = [*TRAIN, "--data-path", tmp_path / "pack", "--num-workers", workers]
    with start_script(*command, cwd=tmp_path) as process:
        wait_for_step(tmp_path, 3, process)
        damage(tmp_path / "pack")
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 1, said
    shutil.rmtree(tmp_path / "pack")
    (tmp_path / "whole").rename(tmp_path / "pack")
    assert_ended(said, words, tmp_path, tmp_path / "pack")


@pytest.mark.slow
def test_a_rank_whose_loading_process_is_killed_ends_all_ranks_after_the_same_step(shapes, tmp_path):
    command = [*TRAIN, "--data-path", shapes, "--num-workers", 1]
    process = start_python(*command, cwd=tmp_path, launcher=TORCHRUN)
    wait_for_step(tmp_path, 3, process)
    ranks = sorted(pid for pid in workers_of(process.pid) if workers_of(pid))
    second = next(
        pid for pid in ranks if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes().replace(b"_RANK", b"")
    )
    os.kill(workers_of(second)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 1, said
    assert_ended(said.partition("Traceback")[0], "rank 1: a loading process ended (SIGKILL)", tmp_path, shapes)


RAISE = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
import state
def broken(self, samples):
    self.calls = getattr(self, "calls", 0) + 1
    if self.calls == 3:
        raise AttributeError("a mistake")
    advance(self, samples)
advance, state.TrainingState.advance = state.TrainingState.advance, broken
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_error_that_nothing_catches_ends_a_run_and_its_loading_processes(shapes, tmp_path):
    (tmp_path / "broken.py").write_text(RAISE)
    command = [tmp_path / "broken.py", ROOT / "EqM" / TRAIN[0], *TRAIN[1:], "--data-path", shapes, "--num-workers", 2]
    process = start_python(*command, cwd=tmp_path)  # a warm process would not end as Python does
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    assert "AttributeError: a mistake" in said
    assert lock(tmp_path / "results" / NAME)  # which its forks would keep


@pytest.mark.slow
def test_loading_processes_end_with_a_trainer_that_is_killed(shapes, tmp_path):
    with start_script(*TRAIN, "--data-path", shapes, "--num-workers", 2, cwd=tmp_path) as process:
        wait_for_step(tmp_path, 2, process)
        workers = workers_of(process.pid)
        assert len(workers) == 2
        process.kill()
        end = time.monotonic() + 60
        while any(map(is_running, workers)):
            assert time.monotonic() < end, "loading processes outlive the trainer"
            time.sleep(0.05)
