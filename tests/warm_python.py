"""Python processes that need not import torch: forks of a server that has imported it already.

`python script.py` takes seconds to import torch, torchvision, timm and av, and hundreds of tests start a script. The
server of this module imports them once a test session. For each request it forks a child, which becomes the script.

A child stands in for `python script.py` in what a script can tell by itself: arguments, current folder, environment,
standard streams, `__main__`, the folder of the script first on sys.path, seeds, signals, threads and functions that the
end waits for, and the exit status. It does not where a test is about one of these:

- memory: what the server holds counts as the child's from the start;
- imports, and signals or time before they have ended;
- environment variables that are read by an import, which `fits` refuses;
- the seed of hashes, and so the order in sets, which all children of a session share;
- threads other than one, and GPUs;
- the last moments, in which Python takes modules apart;
- the launcher's parent: all children have the server's process for a parent.

Such tests start Python itself, and so does at least one test of each command. The project's own modules are not
imported here: each child imports them anew.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import torch.distributed as dist

from warm_server import LARGEST_REQUEST, READY

# One thread, since a process with several does not fork well, and no GPU, which no fork can share.
FIXED = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# What a launcher tells its processes, and pytest its own: no import reads them.
FREE = {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"}
FREE |= {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"}
FREE |= {"PYTEST_CURRENT_TEST", "PYTEST_VERSION"}
FREE |= {"CUBLAS_WORKSPACE_CONFIG"}  # which is for GPUs alone
FREE |= {"EQM_CACHE"}  # which only the project reads
FREE |= {"PYTHONPATH"}  # which a child looks through for what is not imported yet
SERVER = Path(__file__).with_name("warm_server.py")
PATIENCE_S = 30  # of torchrun with processes that it has asked to end


class WarmProcess:
    """A script that runs in a fork of the server, with the methods of subprocess.Popen.

    Its output goes to files, so that nobody need read it while it runs.

    Attributes:
        pid: its process id, and that of its session and group.
        returncode: None until `poll`, `wait` or `communicate` saw its end; minus the signal that ended it.
    """

    def __init__(self, arguments: list[str], status: int, streams: list[IO[bytes]]):
        self.args, self.returncode = arguments, None
        self._status, self._streams = os.fdopen(status, "rb", buffering=0), streams
        self.pid = self._read()

    def _read(self) -> int:
        line = self._status.readline()
        if not line:
            raise RuntimeError("the server of warm Python processes has ended")
        return int(line)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._read()
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and to stderr, once it has ended; raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        return read_text(self._streams[0]), read_text(self._streams[-1])

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once, if it still runs."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "WarmProcess":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing of it is left."""
        self.kill()
        self.wait()
        for stream in self._streams:
            stream.close()


def read_text(stream: IO[bytes]) -> str:
    """All of a file, as subprocess reads text: the \r of a progress bar becomes a line's end.

    The place where processes go on writing stays, which they share with this one.
    """
    file = stream.fileno()
    return os.pread(file, os.fstat(file).st_size, 0).decode().replace("\r\n", "\n").replace("\r", "\n")


class WarmPython:
    """The server, as tests see it: started with the first script, ended by `close` or with this process."""

    def __init__(self):
        self.environment = {key: value for key, value in os.environ.items() if key not in FREE} | FIXED
        self._packages = {key: value for key, value in os.environ.items() if key == "PYTHONPATH"}
        self._server: subprocess.Popen | None = None
        self._requests: socket.socket | None = None
        self._ready = False

    def fits(self, environment: dict[str, str]) -> bool:
        """Whether a script in this environment finds there what the server's imports found.

        A server whose imports fail, or start threads, which a fork would lack, fits nothing.
        """
        fixed = {key: value for key, value in environment.items() if key not in FREE}
        return hasattr(os, "pidfd_open") and fixed == self.environment and self._is_ready()

    def start(
        self,
        script: Path,
        *arguments: object,
        cwd: Path,
        environment: dict[str, str],
        streams: Sequence[IO[bytes]] = (),
    ) -> WarmProcess:
        """Starts a script in a session of its own.

        `streams` are files for its stdout and stderr, or one for both; by default two of its own.
        """
        assert self.fits(environment), "the server's imports found another environment"
        streams = list(streams) or [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        command = [str(script), *map(str, arguments)]
        message = json.dumps({"command": command, "cwd": str(cwd), "environment": environment}).encode()
        assert len(message) < LARGEST_REQUEST
        ours, theirs = os.pipe()
        socket.send_fds(self._connection(), [message], [theirs, streams[0].fileno(), streams[-1].fileno()])
        os.close(theirs)
        return WarmProcess(command, ours, streams)

    def run(
        self, script: Path, *arguments: object, cwd: Path, environment: dict[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess:
        """Runs a script to its end, as subprocess.run does."""
        with self.start(script, *arguments, cwd=cwd, environment=environment) as process:
            said = process.communicate(timeout_s)
            return subprocess.CompletedProcess(process.args, process.returncode, *said)

    def run_ranks(
        self, ranks: int, script: Path, *arguments: object, cwd: Path, environment: dict[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess:
        """Runs a script in several processes that find one another as under torchrun, and ends as torchrun does.

        Once one fails, the others are asked to end, and the status is 1.
        """
        end = time.monotonic() + timeout_s
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": store.host, "MASTER_PORT": store.port}
        shared |= {"GROUP_RANK": 0, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        with ExitStack() as stack:
            streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
            processes = []
            for rank in range(ranks):
                own = {"RANK": rank, "LOCAL_RANK": rank} | shared
                its = environment | {name: str(value) for name, value in own.items()}
                process = self.start(script, *arguments, cwd=cwd, environment=its, streams=streams)
                processes.append(stack.enter_context(process))
            while any(process.poll() is None for process in processes):
                if any(process.returncode for process in processes):
                    for process in processes:
                        process.send_signal(signal.SIGTERM)
                    end = min(end, time.monotonic() + PATIENCE_S)
                    for process in processes:
                        process.wait(max(0, end - time.monotonic()))
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(processes[0].args, timeout_s)
                time.sleep(0.01)
            status = int(any(process.returncode for process in processes))
            return subprocess.CompletedProcess(processes[0].args, status, *map(read_text, streams))

    def _is_ready(self) -> bool:
        """Waits for the server's imports; False if it ended in them."""
        if self._requests is None:
            self._ready = self._connection().recv(len(READY)) == READY
        return self._ready

    def _connection(self) -> socket.socket:
        if self._requests is not None and self._server.poll() is not None:  # killed: one test fails, and not all after
            self.close()
        if self._requests is None:
            self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._server = subprocess.Popen(
                    [sys.executable, SERVER, str(theirs.fileno())],
                    env=self.environment | self._packages,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # what Ctrl-C ends is the test session, and that ends this
                )
        return self._requests

    def close(self) -> None:
        """Ends the server."""
        if self._requests is not None:
            self._requests.close()
            self._server.wait(timeout=60)
            self._requests = None
