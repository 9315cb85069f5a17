"""Launches of torchrun, one for each number of ranks, and the lines in which a launch tells what it measured."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime import distributed
from runtime.errors import UserError

RECORD = "measured: "  # begins a line for the process that launched; all other lines are for people
DEFAULTS = {
    # torchrun sets this for several processes, not for one.
    "OMP_NUM_THREADS": "1",
    # On a host with several users, NVLink multicast of one can make the GPUs of all unusable.
    "NCCL_NVLS_ENABLE": "0",
}


def tell(record: dict) -> None:
    """Gives a record to the process that launched these ranks. All ranks may call it; rank 0 writes."""
    if distributed.is_main():
        print(RECORD + json.dumps(record), flush=True)


def launch(ranks: int, script: Path, flags: Sequence[object]) -> Iterator[dict]:
    """Runs a script under torchrun and yields the records that it tells, as they come; prints its other lines.

    Raises:
        UserError: the script failed.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, str(script), *map(str, flags)]
    with subprocess.Popen(command, env=DEFAULTS | os.environ, stdout=subprocess.PIPE, text=True) as process:
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
        raise UserError(f"the launch of {ranks} ranks ended with status {process.returncode}; the lines above say why")
