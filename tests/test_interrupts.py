"""Ctrl-C at any moment of any command: one line, status 130, no traceback, and nothing half-made."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from conftest import ROOT, SMALL, environment_of, run_script

COMMANDS = [path.name for path in sorted((ROOT / "EqM").glob("*.py")) if "cli.run(" in path.read_text()]
MOMENTS_S = [0.1, 0.3, 0.6, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 14, 20]


def start(script: str, *arguments: object, cwd: Path) -> subprocess.Popen:
    """A command as a terminal starts it: in a process group of its own, and heeding Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "EqM" / script), *map(str, arguments)],
        cwd=cwd,
        env=environment_of(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def assert_one_line(process: subprocess.Popen, script: str) -> None:
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (process.returncode, errors)
    lines = [line for line in re.split("[\r\n]+", errors) if "error:" in line]
    assert lines == [f"{script}: error: interrupted"]
    assert "Traceback" not in said + errors
    assert "KeyboardInterrupt" not in said + errors


def wait_for_imports(process: subprocess.Popen) -> None:
    """Until then Python reads the first lines, in which Ctrl-C is its own."""
    while "site-packages" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.002)


@pytest.mark.parametrize("script", COMMANDS)
def test_ctrl_c_during_imports_ends_a_command_with_one_line(tmp_path, script):
    process = start(script, cwd=tmp_path)
    wait_for_imports(process)
    os.killpg(process.pid, signal.SIGINT)
    assert_one_line(process, script)


BUSY = """
import os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
sys.path.insert(0, {folder!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
from runtime.interrupts import end_at_ctrl_c
end_at_ctrl_c()
from runtime.files import write_whole

def write(path):
    path.write_text("half")
    Path("begun").touch()
    time.sleep(60)

class Deaf:
    def __del__(self):  # in which Python drops a KeyboardInterrupt
        while not Path("begun").exists():
            time.sleep(0.01)
        if not os.fork():  # a terminal signals forks too
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        os.wait()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

with ThreadPoolExecutor(1) as pool:  # which waits for its work
    pool.submit(write_whole, Path("whole"), write)
    Deaf()
"""


def test_ctrl_c_gets_through_destructors_and_pools_and_leaves_nothing_half_made(tmp_path):
    script = tmp_path / "busy.py"
    script.write_text(BUSY.format(folder=str(ROOT / "EqM")))
    began = time.monotonic()
    run = run_script(script, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (130, "\nbusy.py: error: interrupted\n")
    assert time.monotonic() - began < 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "busy.py"]


def test_a_command_that_was_started_to_ignore_ctrl_c_does(tmp_path):
    script = tmp_path / "ignoring.py"
    script.write_text(
        f"import signal, sys; sys.path.insert(0, {str(ROOT / 'EqM')!r})\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from runtime.interrupts import end_at_ctrl_c\n"
        "end_at_ctrl_c()\nsignal.raise_signal(signal.SIGINT)\nprint('goes on')\n"
    )
    assert run_script(script, cwd=tmp_path).stdout == "goes on\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["check_data.py", "prepare.py", "sample_gd.py", "evaluate.py", "score.py", "plot.py"]
)
def test_ctrl_c_at_any_moment_ends_a_command_and_the_next_one_works(shapes, checkpoint, tmp_path, script):
    arguments = {
        "check_data.py": [shapes, "--video"],
        "prepare.py": [shapes, tmp_path / "pack", "--video", "--image-size", 16, "--num-workers", 2],
        "sample_gd.py": ["--ckpt", checkpoint, "--folder", "samples", "--num-sampling-steps", 50],
        "evaluate.py": [shapes, shapes.parent / "test", "--image-size", 16],
        "score.py": ["--ckpt", checkpoint, shapes, shapes.parent / "test"],
        "plot.py": [checkpoint.parent.parent],
    }[script]
    for moment in MOMENTS_S:
        process = start(script, *arguments, cwd=tmp_path)
        wait_for_imports(process)
        try:
            process.wait(moment)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            if process.wait(60) == 0:
                break  # it came after the work
            assert_one_line(process, script)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_at_any_moment_of_a_training_ends_it_and_it_goes_on(shapes, tmp_path, workers):
    command = ["train.py", *SMALL, "--data-path", shapes, "--num-workers", workers, "--resume", "--max-steps", 40]
    for moment in MOMENTS_S:
        process = start(*command, cwd=tmp_path)
        wait_for_imports(process)
        try:
            process.wait(moment)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            said, errors = process.communicate(timeout=60)
            assert process.returncode in (130, 75, 0), (process.returncode, errors)
            assert "Traceback" not in said + errors
            assert "KeyboardInterrupt" not in said + errors
            if process.returncode == 0:
                break
    assert process.returncode == 0, process.communicate()
    assert len(list((tmp_path / "results").iterdir())) == 1
