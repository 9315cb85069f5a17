"""A loading process or a pack that is lost ends a training in one line, on every rank, with the state saved."""

import gc
import os
import shutil
import signal
import subprocess
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from conftest import ROOT, SMALL, make_pack, run_script
from data.batches import make_loader
from data.loading import LoadedBatches
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
    """As `rsync --inplace` of another pack of the same sizes: a run never sees an empty file, as it may with `cp`."""
    for path in pack.glob("*.bin"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))


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


on_linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux alone tells what is shared")


def private_mb(pid: int | str) -> float:
    """The memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


COPIED_MB = 10  # more than anything but a collection lets a process copy meanwhile


class Collecting(Dataset):
    """Batches that say by how much a full collection raises the private memory of their loading process."""

    def __getitems__(self, keys: list[int]) -> dict:
        before = private_mb("self")
        gc.collect()
        return {"grown_mb": private_mb("self") - before}


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """Objects of other tests are not frozen, and those of this test do not stay so. Only the test itself collects."""
    gc.unfreeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@on_linux
def test_a_collection_in_a_loading_process_or_in_the_trainer_copies_no_shared_memory(unfrozen):
    kept = [[] for _ in range(300_000)]  # 20 MB of objects, beside those of torch
    loaded = LoadedBatches(make_loader(Collecting(), [[0]] * 8, num_workers=1, pin_memory=False), lambda batch: None)
    batches = iter(loaded)
    assert next(batches)["grown_mb"] < COPIED_MB
    (process,) = loaded.processes
    before = private_mb(process.pid)
    gc.collect()
    assert private_mb(process.pid) - before < COPIED_MB
    assert len(list(batches)) == 7
    assert len(kept) == 300_000


@on_linux
def test_what_is_garbage_when_loading_processes_start_is_not_kept_for_ever(unfrozen):
    garbage = Collecting()
    garbage.itself, gone = garbage, weakref.ref(garbage)
    del garbage
    loaded = LoadedBatches(make_loader(Collecting(), [[0]], num_workers=1, pin_memory=False), lambda batch: None)
    assert len(list(loaded)) == 1
    assert not gone()


@on_linux
def test_without_loading_processes_nothing_is_frozen(unfrozen):
    loaded = LoadedBatches(make_loader(Collecting(), [[0]], num_workers=0, pin_memory=False), lambda batch: None)
    assert len(list(loaded)) == 1
    assert gc.get_freeze_count() == 0
