"""The server of warm_python.py: imports what takes time, and becomes a script in a fork for each request."""

import atexit
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

LARGEST_REQUEST = 2**17  # bytes
READY = b"ready"  # what the server says once it has imported everything


@dataclass
class Request:
    """A script to become, and the files of its status, stdout and stderr."""

    command: list[str]
    cwd: str
    environment: dict[str, str]
    files: list[int]

    def become(self) -> None:
        """Makes this process the one that `python script.py` would start, up to its first line."""
        os.setsid()
        status, out, err = self.files
        os.dup2(out, 1)
        os.dup2(err, 2)
        for file in self.files:
            os.close(file)
        os.chdir(self.cwd)
        inherited, own = packages_of(os.environ), packages_of(self.environment)
        os.environ.clear()
        os.environ.update(self.environment)
        others = [folder for folder in sys.path[1:] if folder not in inherited]
        sys.argv, sys.path[:] = self.command, [str(Path(self.command[0]).parent), *own, *others]
        random.seed()
        sys.modules["numpy"].random.seed()
        sys.modules["torch"].default_generator.seed()


def packages_of(environment: Mapping[str, str]) -> list[str]:
    """The folders that PYTHONPATH names, as sys.path has them."""
    return [str(Path(folder).absolute()) for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]


def import_what_scripts_import() -> None:
    """Imports the packages that take time, and none of the project."""
    import av  # noqa: F401
    import numpy  # noqa: F401
    import PIL.ImageDraw  # noqa: F401
    import timm.models.vision_transformer  # noqa: F401
    import torch.distributed
    import torch.nn.parallel
    import torch.utils.data  # noqa: F401
    import torchvision.datasets.folder  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401
    import tqdm.contrib.logging  # noqa: F401

    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a fork would lack all but one"


def serve(requests: socket.socket) -> Request | None:
    """Answers requests. Returns in each child, with what it is to become, and at the end, with None.

    The answer goes to the request's status file: a line with the process id, and one with the exit status.
    """
    running: dict[int, tuple[int, int]] = {}  # by a file that tells of its end: a process, and its status file
    with requests, selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in running:
                    selector.unregister(key.fd)
                    pid, status = running.pop(key.fd)
                    os.close(key.fd)
                    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    answer(status, ended)
                    os.close(status)
                    continue
                message, files, _, _ = socket.recv_fds(requests, LARGEST_REQUEST, 3)
                if not message:
                    return None
                request = Request(**json.loads(message), files=files)
                pid = os.fork()
                if not pid:
                    for file, (_, status) in running.items():
                        os.close(file)
                        os.close(status)
                    return request
                status, *others = request.files
                for file in others:
                    os.close(file)
                answer(status, pid)
                file = os.pidfd_open(pid)
                running[file] = pid, status
                selector.register(file, selectors.EVENT_READ)


def answer(status: int, number: int) -> None:
    """Writes a line, to nobody where the test is gone."""
    with suppress(BrokenPipeError):
        os.write(status, f"{number}\n".encode())


def end_after(run: Callable[[], object]) -> NoReturn:
    """Calls a function and ends this process as Python does, but for taking apart what is imported, which takes 1 s."""
    status, interrupted = 0, False
    try:
        run()
    except SystemExit as end:
        is_number = end.code is None or isinstance(end.code, int)
        status = (end.code or 0) & 0xFF if is_number else 1
        if not is_number:
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def main() -> None:
    import_what_scripts_import()
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.send(READY)
    request = serve(requests)
    if not request:
        os._exit(0)
    request.become()
    end_after(lambda: runpy.run_path(request.command[0], run_name="__main__"))


if __name__ == "__main__":
    main()
