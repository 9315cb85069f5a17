"""What a launcher leaves in the environment, how ranks meet, and what one rank alone cannot do."""

import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from conftest import ROOT, SMALL, run_ranks, spawn
from runtime import cli, distributed, environment, meeting
from runtime.environment import Place
from runtime.errors import UserError

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "SLURM_JOB_NODELIST": "n[1-2]"}
AT = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
PATIENCE_S = meeting.PATIENCE_S
TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"} | AT


@pytest.fixture
def launched(monkeypatch):
    """Sets variables, after all that a launcher sets are gone."""

    def put(variables: dict[str, str]) -> None:
        for name in (*environment.PLACE, *environment.MEETING, *environment.COUNTS, "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


WRONG = {
    "empty": ({"WORLD_SIZE": ""}, "where WORLD_SIZE is no number"),
    "an empty rank": (TWO | {"RANK": ""}, "where RANK is no number"),
    "no number": (TWO | {"LOCAL_RANK": "a"}, "where LOCAL_RANK is no number"),
    "negative": (TWO | {"RANK": "-1"}, "where RANK is no number"),
    "digits that int takes": (TWO | {"WORLD_SIZE": "²"}, "where WORLD_SIZE is no number"),
    "5,000 digits": (TWO | {"WORLD_SIZE": "9" * 5000}, "where WORLD_SIZE is no number"),
    "size alone": ({"WORLD_SIZE": "4"}, "without RANK"),
    "rank alone": ({"RANK": "0"}, "without WORLD_SIZE"),
    "local rank alone": ({"LOCAL_RANK": "0"}, "without WORLD_SIZE"),
    "nowhere": ({"WORLD_SIZE": "2", "RANK": "1"}, "without MASTER_ADDR"),
    "an empty address": (TWO | {"MASTER_ADDR": ""}, "without MASTER_ADDR"),
    "no port": (TWO | {"MASTER_PORT": "http"}, "where MASTER_PORT is no number"),
    "a large port": (TWO | {"MASTER_PORT": "70000"}, "which cannot be"),
    "a large rank": (TWO | {"RANK": "2"}, "which cannot be"),
    "a large local rank": (TWO | {"LOCAL_RANK": "7"}, "which cannot be"),
    "no processes": (TWO | {"WORLD_SIZE": "0"}, "which cannot be"),
    "restarts": ({"TORCHELASTIC_RESTART_COUNT": "x"}, "where TORCHELASTIC_RESTART_COUNT is no number"),
}


@pytest.mark.parametrize(("variables", "why"), WRONG.values(), ids=WRONG.keys())
def test_variables_that_cannot_be_right_are_refused_at_once_in_one_line(launched, capfd, variables, why):
    launched(variables)
    monotonic = time.monotonic()
    with pytest.raises(SystemExit) as end:
        cli.run(distributed.start, "")
    assert end.value.code == 1
    assert time.monotonic() - monotonic < 5  # no rank 0 to wait for
    (line,) = capfd.readouterr().err.splitlines()
    assert why in line
    assert "unset" in line


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place()),
        (SLURM | AT, Place()),
        (SLURM | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, Place()),
        (TWO, Place(1, 2, 1, "localhost", 29500)),
        ({"WORLD_SIZE": "2", "RANK": "1"} | AT, Place(1, 2, 0, "localhost", 29500)),
        (TWO | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, Place(1, 2, 1, "localhost", 29500, launcher_listens=True)),
    ],
)
def test_the_place_of_a_process_is_what_a_launcher_says_and_nothing_of_slurm(launched, variables, place):
    launched(variables)
    assert environment.place() == place
    assert environment.speaks() == (place.rank == 0)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("missing", ["rank 0", "rank 1", "the launcher"])
def test_ranks_that_never_come_are_named_with_the_place_and_the_time(launched, monkeypatch, caplog, missing):
    monkeypatch.setattr(meeting, "PATIENCE_S", 0.6)
    monkeypatch.setattr(meeting, "QUIET_S", 0.1)
    port = free_port()
    own = {"RANK": "0" if missing == "rank 1" else "1", "MASTER_PORT": str(port)}
    launched(TWO | own | ({"TORCHELASTIC_USE_AGENT_STORE": "True"} if missing == "the launcher" else {}))
    with pytest.raises(UserError, match=f"{missing} did not come to localhost:{port} within 0.0 minutes"):
        distributed.start()
    (said,) = caplog.messages
    assert said.startswith(f"waiting for {missing} at localhost:{port}, for at most")
    assert 60 <= PATIENCE_S <= 600


def test_another_program_at_the_address_is_not_waited_for(launched, monkeypatch):
    monkeypatch.setattr(meeting, "PATIENCE_S", 0.6)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        launched(TWO | {"MASTER_PORT": str(port)})
        with pytest.raises(UserError, match=f"an answer did not come to localhost:{port}"):
            distributed.start()
        launched(TWO | {"RANK": "0", "MASTER_PORT": str(port)})
        with pytest.raises(UserError, match=f"cannot meet at localhost:{port}: .*[Aa]ddress already in use"):
            distributed.start()


def test_a_second_process_of_the_same_rank_is_refused(launched):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    launched(TWO | {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"})
    dist.PrefixStore("start0", store).add("rank 1", 1)
    with pytest.raises(UserError, match=f"another process at localhost:{store.port} has RANK=1 too"):
        distributed.start()


def alone(rank: int, folder: Path, failing: list[int]) -> None:
    """What each rank sees if some cannot do what all must."""
    distributed.start()

    def read() -> int:
        if rank in failing:
            raise UserError("the file cannot be read")
        return rank

    for function in (lambda: distributed.together(read), lambda: distributed.check_same_flags({"lr": rank in failing})):
        try:
            said = function()
        except UserError as error:
            said = str(error)
        with (folder / f"{rank}.txt").open("a") as file:
            file.write(f"{said}\n")
    distributed.stop()


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (
            [1],
            ["rank 1: the file cannot be read", "rank 1 has --lr True, and rank 0 has False: give all the same flags"],
        ),
        ([0, 1], ["the file cannot be read", "None"]),
        ([], [None, "None"]),
    ],
)
def test_what_one_rank_cannot_do_ends_all_with_its_number(tmp_path, failing, said):
    spawn(alone, (tmp_path, failing), 2, tmp_path)
    for rank in range(2):
        first, second = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert (first, second) == (said[0] or str(rank), said[1])


def test_ranks_with_other_flags_and_an_unreadable_checkpoint_end_a_training_with_one_line(shapes, checkpoint, tmp_path):
    """Started by hand, as on two machines: nobody ends the other rank if one fails."""
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(checkpoint.read_bytes()[:-9])
    script = tmp_path / "train_with.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'EqM')!r})\n"
        "if os.environ['RANK'] == '1':\n"
        "    if sys.argv.pop(1) == 'flags':\n"
        "        sys.argv += ['--lr', '3']\n"
        "    else:\n"
        "        import runs.checkpoint\n"
        "        whole = runs.checkpoint.load_file\n"
        f"        runs.checkpoint.load_file = lambda path: whole(type(path)({str(damaged)!r}))\n"
        "else:\n"
        "    del sys.argv[1]\n"
        f"runpy.run_path({str(ROOT / 'EqM' / 'train.py')!r}, run_name='__main__')\n"
    )
    for kind, line in (("flags", "rank 1 has --lr 3.0, and rank 0 has None"), ("file", "rank 1: ")):
        flags = ["--data-path", shapes, *SMALL, "--ckpt", checkpoint, "--max-steps", 6]
        run = run_ranks(2, script, kind, *flags, cwd=tmp_path)
        assert run.returncode == 1
        assert f"error: {line}" in run.stderr
        assert run.stderr.count("error: ") == 1
        assert "Traceback" not in run.stderr
    assert not (tmp_path / "results").exists()
