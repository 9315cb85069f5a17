"""Kills training runs with SIGKILL at random moments, resumes each, and compares it with one that nothing stopped.

    python tests/kill_and_resume.py datasets/moving-shapes/train /tmp/killed --kills 50

All runs are forks of one process that has imported everything, so that one takes seconds.
"""

import argparse
import os
import random
import runpy
import shutil
import sys
import time
import traceback
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "EqM" / "train.py"
FLAGS = "--video --clip-len 4 --image-size 16 --model EqM-Ti/4 --num-workers 0 --log-every 5 --ckpt-every 2 --keep 2"
STEPS = 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="class folders of videos")
    parser.add_argument("folder", type=Path, help="gets the runs; each is removed once it is compared")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def fork_training(data: Path, results: Path) -> int:
    """Starts training in a fork, and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    arguments = f"--results-dir {results} --resume --max-steps {STEPS}".split()
    sys.argv = [str(TRAIN), "--data-path", str(data), *FLAGS.split(), *arguments]
    status = 1
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def train_to_the_end(data: Path, results: Path) -> float:
    """Seconds that it took."""
    start = time.perf_counter()
    _, status = os.waitpid(fork_training(data, results), 0)
    if status:
        sys.exit(f"training in {results} ended with status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start


def kill_one(data: Path, results: Path, rng: random.Random, seconds: float, in_a_write: bool) -> str:
    """Kills a run, once or several times, and returns what the last kill met."""
    checkpoints = results / "000-EqM-Ti-4-Linear-velocity-None" / "checkpoints"
    for leftover in checkpoints.glob("*.tmp"):  # of an earlier kill, which would be taken for this one's
        leftover.unlink()
    pid, end = fork_training(data, results), time.perf_counter() + rng.uniform(0, seconds)
    while time.perf_counter() < end or (in_a_write and not list(checkpoints.glob("*.tmp"))):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return "after its end"
        time.sleep(0.0005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    if list(checkpoints.glob("*.tmp")):
        return "inside a checkpoint's write"
    return "between two steps" if list(checkpoints.glob("*.pt")) else "before the first checkpoint"


def final_state(results: Path) -> dict:
    return load_checkpoint(results / "000-EqM-Ti-4-Linear-velocity-None" / "checkpoints" / f"{STEPS:07d}.pt")


def same(a: object, b: object) -> bool:
    """Bitwise, all through dicts."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - {"config"})
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def main() -> None:
    args = parse_args()
    rng, met, equal = random.Random(args.seed), {}, 0
    train_to_the_end(args.data, args.folder / "warm-up")
    seconds = train_to_the_end(args.data, args.folder / "straight")
    right = final_state(args.folder / "straight")
    for i in range(args.kills):
        results = args.folder / f"killed{i}"
        for _ in range(rng.choice([1, 1, 2])):
            moment = kill_one(args.data, results, rng, seconds, in_a_write=i % 5 == 4)
            met[moment] = met.get(moment, 0) + 1
        train_to_the_end(args.data, results)
        equal += same(final_state(results), right)
        shutil.rmtree(results)
    for moment, count in sorted(met.items()):
        print(f"killed {moment}: {count}")
    print(f"{equal} of {args.kills} runs ended bitwise equal to the one that nothing stopped")
    sys.exit(0 if equal == args.kills else 1)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(TRAIN.parent))
    import torch

    import train  # noqa: F401
    from runs.checkpoint import load_checkpoint

    main()
