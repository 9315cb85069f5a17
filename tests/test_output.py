"""Output that cannot be written: streams that drop it, files that are whole or absent, and flags that are refused."""

import argparse
import errno
import importlib
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import make_moving_shapes
from conftest import ROOT, SMALL, WARM, environment_of, run_script
from data.video import write_video
from drawing.pictures import write_gif, write_png
from drawing.plots import Lines, write_plots
from runtime import files, logs
from runtime.errors import UserError
from sampling.outputs import Output
from sampling.plan import class_index, parse_sum

NAME = "000-EqM-Ti-4-Linear-velocity-None"
COMMANDS = [path.stem for path in sorted((ROOT / "EqM").glob("*.py")) if "cli.run(main" in path.read_text()]
MAKERS = ["make_moving_shapes", "make_fashion_mnist", "make_clip_art"]
CLIP = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
ODD = os.fsdecode(b"K\xff\n\x1b[31m\xc3\xa9")  # a name that is no UTF-8, with a newline and a colour


@contextmanager
def disk_for(num_bytes: int) -> Iterator[None]:
    """No file can become larger than so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def broken_stream(kind: str) -> object:
    """A file that takes nothing: a pipe whose reader has gone, or a full disk."""
    if kind == "full":
        return open("/dev/full", "wb")  # noqa: PTH123, SIM115
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "wb")


def status_with(stream: object, errors: object, script: str, *arguments: object, cwd: Path) -> int:
    """The exit status of a command with these for its stdout and its stderr."""
    environment = environment_of()
    if WARM.fits(environment):
        path, streams = ROOT / "EqM" / script, [stream, errors]
        with WARM.start(path, *arguments, cwd=cwd, environment=environment, streams=streams) as process:
            return process.wait(120)
    command = [sys.executable, str(ROOT / "EqM" / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, stdout=stream, stderr=errors, timeout=120).returncode


@pytest.mark.parametrize(("kind", "workers"), [("full", 0), ("gone", 2)])
def test_a_training_whose_output_cannot_be_written_goes_on_to_its_end(shapes, tmp_path, kind, workers):
    flags = ["--data-path", shapes, *SMALL, "--max-steps", 2, "--log-every", 1, "--num-workers", workers]
    assert status_with(broken_stream(kind), broken_stream(kind), "train.py", *flags, cwd=tmp_path) == 0
    run = tmp_path / "results" / NAME
    assert (run / "checkpoints" / "0000002.pt").exists()
    assert "INFO done: " in (run / "log.txt").read_text()


@pytest.mark.parametrize(("kind", "status"), [("gone", 141), ("full", 1)])
def test_a_command_that_only_prints_ends_quietly_if_the_reader_has_gone_and_with_an_error_if_the_disk_is_full(
    shapes, tmp_path, kind, status
):
    with (tmp_path / "errors").open("wb") as errors:
        assert status_with(broken_stream(kind), errors, "check_data.py", shapes, "--video", cwd=tmp_path) == status
    said = "".join((tmp_path / "errors").read_text().splitlines()[-1:]).startswith(
        "check_data.py: error: the output cannot be written: No space left on device"
    )
    assert said == (kind == "full")
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_a_command_that_makes_a_file_makes_it_though_nobody_reads_what_it_says(tmp_path):
    (tmp_path / "run").mkdir()
    row = dict.fromkeys(("step", "loss", "grad_norm", "samples_per_second", "scaler_scale"), 1)
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert status_with(broken_stream("gone"), broken_stream("gone"), "plot.py", "run", cwd=tmp_path) == 0
    assert (tmp_path / "plot.png").stat().st_size > 0


STREAMS = """
import os, sys
from runtime.streams import lost_output, make_output_lossy
make_output_lossy()
for text in ("first \\u00e9 \\udcff", "second"):
    print(text)
    print(text, file=sys.stderr)
with open("result", "w") as file:
    file.write(f"{file.fileno() > 2} {lost_output() and lost_output().errno}")
"""


@pytest.mark.parametrize(
    ("redirect", "lost"),
    [(">&- 2>&-", None), (">&- 2>&- <&-", None), ("full", errno.ENOSPC), ("gone", errno.EPIPE)],
)
def test_streams_that_cannot_be_written_raise_nothing_and_no_file_takes_the_place_of_a_closed_one(
    tmp_path, redirect, lost
):
    environment = environment_of() | {"PYTHONPATH": str(ROOT / "EqM")}
    command, stream = [sys.executable, "-c", STREAMS], None
    if redirect.startswith(">"):
        command = ["bash", "-c", f'exec "$@" {redirect}', "bash", *command]
    else:
        stream = broken_stream(redirect)
    subprocess.run(command, cwd=tmp_path, env=environment, stdout=stream, stderr=stream, check=True)
    assert (tmp_path / "result").read_text() == f"True {lost}"


def test_letters_that_a_terminal_lacks_are_escaped(tmp_path):
    environment = environment_of() | {"PYTHONPATH": str(ROOT / "EqM"), "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-c", STREAMS]
    run = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert run.stdout.decode("ascii").splitlines() == ["first \\xe9 \\udcff", "second"]
    assert run.stderr == run.stdout


@pytest.fixture
def handlers() -> Iterator[list[logging.Handler]]:
    """The log's handlers, which are as they were after the test."""
    before = list(logs.log.handlers)
    yield logs.log.handlers
    for handler in set(logs.log.handlers) - set(before):
        handler.close()
    logs.log.handlers[:] = before


def test_a_name_in_the_log_is_one_line_without_control_characters(tmp_path, capsys, handlers):
    logs.start_log(tmp_path / "log.txt")
    logs.log.info("read %s", ODD)
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text(encoding="utf-8")):
        assert text.endswith("INFO read K\\udcff\\n\\x1b[31mé\n")
        assert text.count("\n") == 1


def test_an_error_is_one_line_whatever_the_names_in_it(capsys, monkeypatch):
    cli = importlib.import_module("runtime.cli")

    def main() -> None:
        raise UserError(f"{ODD} cannot be read")

    monkeypatch.setenv("RANK", "")  # left over, and empty
    with pytest.raises(SystemExit):
        cli.run(main, "")
    assert capsys.readouterr().err.endswith(": error: K\\udcff\\n\\x1b[31mé cannot be read\n")


def test_a_full_disk_is_one_line_wherever_it_is_met(tmp_path, capsys):
    def main() -> None:
        (tmp_path / "log").write_text("x" * 1000)

    with disk_for(100), pytest.raises(SystemExit, match="1"):
        importlib.import_module("runtime.cli").run(main, "")
    assert capsys.readouterr().err.endswith(": error: a file cannot be written: File too large\n")


def within(seconds: float, call: Callable[[], object]) -> list:
    """What a call returned or raised, in a list; empty if it has not ended in this time."""
    ended: list = []

    def run() -> None:
        try:
            ended.append(call())
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return ended


def test_a_log_that_is_a_pipe_without_a_reader_is_not_waited_for(tmp_path, capsys, handlers):
    os.mkfifo(tmp_path / "log.txt")
    logs.start_log(tmp_path / "log.txt")
    ended = within(20, lambda: logs.log.info("step 1"))
    os.close(os.open(tmp_path / "log.txt", os.O_RDONLY | os.O_NONBLOCK))  # lets go a thread that waits
    assert ended == [None]
    assert "log.txt cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_names_that_are_no_utf_8_do_not_end_a_command_on_an_ascii_terminal(shapes, checkpoint, tmp_path):
    (tmp_path / ODD).mkdir()
    for path in sorted((shapes / "CircleUp").iterdir())[:2]:
        (tmp_path / ODD / path.name).symlink_to(path)
    ascii_terminal = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    flags = ["--ckpt", checkpoint, "--num-fid-samples", 2, "--num-sampling-steps", 1, "--init", ODD]
    for script, *arguments in (["sample_gd.py", *flags], ["evaluate.py", ODD, "samples"]):
        command = [sys.executable, str(ROOT / "EqM" / script), *map(str, arguments)]
        environment = environment_of() | ascii_terminal
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert run.returncode == 0, run.stderr
        assert b"\x1b[31m" not in run.stdout + run.stderr
    assert os.fsencode(f"{ODD}/") in (tmp_path / "samples" / "samples.csv").read_bytes()


def test_a_table_gives_names_back_as_the_system_has_them(tmp_path):
    files.write_csv(tmp_path / "a.csv", [["file", "class"], [f"{ODD}/1.mp4", "a,b"], ["é", ""]])
    assert [row["file"] for row in files.read_csv(tmp_path / "a.csv")] == [f"{ODD}/1.mp4", "é"]
    assert os.fsencode(ODD) in (tmp_path / "a.csv").read_bytes()
    files.write_csv(tmp_path / "a.csv", [["\ud800"]])  # which no file is called
    assert (tmp_path / "a.csv").read_bytes() == b"\\ud800\r\n"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_and_not_replaced(tmp_path, there):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "report.json", tmp_path / "report.json"
    link.symlink_to(target)
    if there:
        target.write_text("old")
    files.check_writable("--output", link)
    files.write_whole(link, lambda temporary: temporary.write_text("new"))
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "report.json", "report.json"]


def test_a_pipe_gets_the_bytes_and_stays_a_pipe(tmp_path):
    pipe, content = tmp_path / "pipe", bytes(range(256)) * 1024  # more than a pipe holds
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    files.check_writable("--output", pipe)

    def write() -> None:
        while True:  # until the reader has opened it
            try:
                return files.write_whole(pipe, lambda temporary: temporary.write_bytes(content))
            except OSError as error:
                assert error.errno == errno.ENXIO

    assert within(20, write) == [None]
    assert pipe.is_fifo()
    reader.join(20)
    assert got == [content]
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_gets_the_bytes_and_stays_a_device():
    ours, theirs = os.openpty()
    terminal = Path(os.ttyname(theirs))
    files.check_writable("--output", terminal)
    files.write_whole(terminal, lambda temporary: temporary.write_bytes(b"whole"))
    assert os.read(ours, 100) == b"whole"
    assert terminal.is_char_device()
    os.close(ours)
    os.close(theirs)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def identity(path: Path) -> tuple[int, ...]:
    """Returns what tells a replaced or changed entry from an old one. Following a link only moves its access time."""
    status = path.lstat()
    return status.st_ino, status.st_mode, status.st_nlink, status.st_size, status.st_mtime_ns


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.mkdir, "folder"),
        (make_socket, "not a file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (os.mkfifo, "No such device"),  # a pipe without a reader
        (lambda path: path.symlink_to("/dev/full"), "No space left"),
    ],
    ids=["folder", "socket", "loop", "pipe", "full"],
)
def test_what_is_no_file_is_one_line_and_stays_what_it_is(tmp_path, monkeypatch, make, said):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = Path("thing")
    make(path)
    before = identity(path)
    for act in (
        lambda: files.check_writable("--output", path),
        lambda: files.write_output(path, lambda temporary: temporary.write_text("new")),
    ):
        (error,) = within(20, act)
        if act.__code__.co_names[1] == "check_writable" and said in ("No such device", "No space left"):
            assert error is None  # only writing can tell
            continue
        assert isinstance(error, UserError)
        assert said in str(error)
        assert str(error).startswith(("--output thing ", "thing cannot be written: "))
    assert identity(path) == before
    assert list(Path().iterdir()) == [path]


def test_a_full_disk_and_a_file_for_a_folder_are_found_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output .*file/a.csv cannot be written: Not a directory"):
        files.check_writable("--output", tmp_path / "file" / "a.csv")
    output = Output(tmp_path / "samples", ".png", None)
    with disk_for(100):
        with pytest.raises(UserError, match="--output .*a.csv cannot be written: File too large"):
            files.check_writable("--output", tmp_path / "a.csv")
        with pytest.raises(UserError, match="--folder .*samples cannot be written: File too large"):
            output.prepare(1)


WRITERS = {
    "a.png": lambda path: write_png(path, CLIP[0]),
    "a.gif": lambda path: write_gif(path, CLIP, 8),
    "a.mp4": lambda path: write_video(path, CLIP, 8),
    "a.mkv": lambda path: write_video(path, CLIP, 8, lossless=True),
    "a.avi": lambda path: make_moving_shapes.write_avi(path, CLIP),
    "a.csv": lambda path: files.write_csv(path, [["file"], *[[str(i)] for i in range(1000)]]),
    "a.json": lambda path: files.write_text(path, "x" * 1000),
    "plot.png": lambda path: write_plots(path, [Lines({"a": [(0, 1.0), (1, 2.0)]}, "x", "y")]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_where_the_disk_is_full_the_old_file_stays_and_nothing_is_half_made(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"old")
    with disk_for(200), pytest.raises((UserError, OSError), match="File too large"):
        WRITERS[name](path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    WRITERS[name](path)
    assert path.stat().st_size > 200
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("maker", ["make_moving_shapes", "make_corruptions"])
def test_a_data_set_on_a_full_disk_is_one_line_without_half_made_clips(shapes, tmp_path, monkeypatch, capsys, maker):
    flags = ["--train-clips", 1, "--test-clips", 0, "--size", 16] if maker == "make_moving_shapes" else [shapes]
    monkeypatch.setattr(sys, "argv", [f"{maker}.py", *map(str, flags), str(tmp_path / "set")])
    module = importlib.import_module(maker)
    with disk_for(500), pytest.raises((SystemExit, UserError)) as end:
        module.main()
    assert "cannot be written: File too large" in str(end.value)
    assert "\n" not in str(end.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def samples_of_before(folder: Path) -> tuple[list[Path], list[Path]]:
    """Samples and what describes them, and what another program left there."""
    folder.mkdir()
    endings = (".npz", "-sheet.png", "-trace.csv", "-trace-norm.png", "-evaluations.png")
    about = [folder / "samples.csv", *(folder.with_name(folder.name + ending) for ending in endings)]
    others = [folder / "000000.png", folder / "notes.txt", folder.with_name("other.npz")]
    for path in (*about, *others):
        path.write_text("old")
    return about, others


def test_what_describes_older_samples_is_gone_before_the_first_new_one(tmp_path):
    about, others = samples_of_before(tmp_path / "samples")
    Output(tmp_path / "samples", ".png", None).prepare(2)
    assert not [path for path in about if path.exists()]
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("reason", ["locked", "other samples"])
def test_samples_are_left_alone_where_another_sampling_runs_or_others_lie(tmp_path, reason):
    about, others = samples_of_before(tmp_path / "samples")
    if reason == "locked":
        assert files.lock(tmp_path / "samples")
    else:
        (tmp_path / "samples" / "000009.png").touch()
    said = {"locked": "another process samples into", "other samples": "000009.png is not one of these samples"}
    with pytest.raises(UserError, match=said[reason]):
        Output(tmp_path / "samples", ".png", None).prepare(2)
    assert all(path.exists() for path in (*about, *others))


def test_clips_do_not_remove_an_npz_which_they_do_not_make(tmp_path):
    (tmp_path / "clips.npz").touch()
    Output(tmp_path / "clips", ".mp4", 8.0).prepare(1)
    assert (tmp_path / "clips.npz").exists()


def test_a_second_sampling_into_one_folder_is_one_line(checkpoint, tmp_path):
    assert files.lock(tmp_path)
    run = run_script("sample_gd.py", "--ckpt", checkpoint, "--folder", tmp_path, cwd=tmp_path.parent)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"sample_gd.py: error: another process samples into {tmp_path}: ")
    assert not list(tmp_path.iterdir())


class Parsed(Exception):
    """Carries a command's parser."""


def actions_of(command: str) -> list[argparse.Action]:
    """The flags of a command, with an argument each."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(command).main()
    return [action for action in parsed.value.args[0]._actions if action.nargs != 0]


def takes(action: argparse.Action, text: str) -> object:
    """The value that a flag takes from a text, or the words with which it refuses."""
    try:
        return action.type(text)
    except argparse.ArgumentTypeError as error:
        return error


@pytest.mark.parametrize("command", [*COMMANDS, *MAKERS])
def test_an_empty_path_is_refused_by_every_flag_of_every_command(command):
    refused = set()
    for action in actions_of(command):
        assert action.type is not Path, action.dest
        if action.type and isinstance(takes(action, "there"), Path | str):
            assert isinstance(takes(action, ""), argparse.ArgumentTypeError), action.dest
            refused.add(action.dest)
    assert refused  # every command reads or writes files
    assert not {a.dest for a in actions_of(command)} & {"vae", "ckpt", "output", "folder", "init"} - refused


BEYOND = [str(2**63), str(10**24), "-" + str(2**63), "9" * 5000, "1e400", "-1e400", "9" * 400 + ".5", "inf", "nan"]


@pytest.mark.parametrize("command", [*COMMANDS, *MAKERS])
def test_a_number_beyond_sense_is_refused_by_every_flag_of_every_command(command):
    for action in actions_of(command):
        if not action.type or isinstance(takes(action, "there"), Path | str):
            continue
        at_least = [] if "seed" in action.dest.replace("seeds", "") else [str(2**62), str(2**31)]
        is_float = isinstance(takes(action, "0.5"), float)
        for text in ["1e39", *BEYOND[3:]] if is_float else [*at_least, *BEYOND]:
            refused = takes(action, text)
            assert isinstance(refused, argparse.ArgumentTypeError), (action.dest, text)
            assert len(str(refused)) < 200


@pytest.mark.parametrize("digits", [5_000, 100_000])
def test_a_class_and_a_sum_of_thousands_of_digits_are_refused_at_once(digits):
    for read in (class_index, parse_sum):
        (error,) = within(5, lambda read=read: read("9" * digits, ["A", "B"]))
        assert isinstance(error, UserError)


def test_an_empty_path_ends_a_command_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot.py", ""])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("plot").main()
    assert capsys.readouterr().err.splitlines() == [
        "plot.py: error: argument RUN: '' is empty: is a variable not set? (--help lists the flags)"
    ]
