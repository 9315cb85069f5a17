"""Launches of our commands: by torchrun, with measurements as lines of JSON, and single ones with a log file."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from runtime import distributed
from runtime.errors import UserError
from runtime.interrupts import undone_at_ctrl_c

RECORD = "measured: "  # prefix of lines for the launching process; all other lines are for people
DEFAULTS = {
    # torchrun sets this only for several processes. One process must compute in the same way.
    "OMP_NUM_THREADS": "1",
    # On a host with several users, NVLink multicast of one user can make the GPUs unusable for all.
    "NCCL_NVLS_ENABLE": "0",
}


def tell(record: dict) -> None:
    """Prints a record for the launching process. All ranks may call it; only rank 0 prints."""
    if distributed.is_main():
        print(RECORD + json.dumps(record), flush=True)


def launch(ranks: int, script: Path, flags: Sequence[object]) -> Iterator[dict]:
    """Runs a script under torchrun. Yields its records as they come, and prints its other lines.

    Raises:
        UserError: the script failed.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, str(script), *map(str, flags)]
    start = subprocess.Popen(command, env=DEFAULTS | os.environ, stdout=subprocess.PIPE, text=True)
    with start as process, undone_at_ctrl_c(process.terminate):
        try:
            for line in process.stdout:
                if line.startswith(RECORD):
                    yield json.loads(line.removeprefix(RECORD))
                else:
                    print(line, end="", flush=True)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise UserError(f"the launch of {ranks} ranks ended with status {process.returncode}: the lines above say why")


def run_logged(log: Path, script: Path, *flags: object, variables: Mapping[str, str] | None = None) -> None:
    """Runs one of our scripts, prints its command, and writes its output into a log file.

    Args:
        variables: more environment variables for it.

    Raises:
        UserError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tqdm.write(shlex.join(["python", f"{script.parent.name}/{script.name}", *map(str, flags)]))
    with log.open("w") as file:
        command, environment = [sys.executable, str(script), *map(str, flags)], os.environ | (variables or {})
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        with undone_at_ctrl_c(process.terminate):
            status = process.wait()
    if status:
        raise UserError(f"{script.name} ended with status {status}: read {log}")
