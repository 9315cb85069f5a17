"""Trains until a fixed target of quality is met, and prints how many seconds of training that took.

    python EqM/speedrun.py shapes-32                                     # today's recipe, five seeds
    python EqM/speedrun.py shapes-32 --train-flags="--lr 1e-3" --seeds 1   # a change of it, one seed
    python EqM/speedrun.py shapes-32 --measure-target                    # what the target has to be

It makes the data, trains with held-out losses, samples and judges from the checkpoints that may be good enough, and
adds a row for each seed to records.jsonl. docs/records.md has the rules.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import json
import math
import platform
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch

from drawing.plots import Lines, check_plots, write_plots
from measuring.records import ROOT, Attempt, make_data, means
from measuring.study_tables import Cell, markdown
from measuring.tracks import TRACKS, TRACKS_OWN, Recipe, Track
from runtime import cli
from runtime.errors import UserError, shown
from runtime.files import check_writable, open_regular
from runtime.logs import device_name

SEEDS, TARGET_SEEDS = (1, 2, 3, 4, 5), (1, 2, 3)
# What must be equal for rows to stand in one line of the table.
SAME = ("recipe", "training", "sampling", "machine", "versions", "jobs", "commit")
CLIP_ART = Path("/usr/share/openclipart/png")


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Trains until a fixed target of quality is met, and prints the seconds of training.")
    parser.add_argument("track", choices=TRACKS, help="the task; cpu: a small one for a CPU; the others need a GPU")
    parser.add_argument("--recipe", type=cli.given, metavar="NAME", help="default the first recipe of the track")
    parser.add_argument("--train-flags", default="", metavar="FLAGS", help="more flags for train.py, as one text")
    parser.add_argument("--sample-flags", default="", metavar="FLAGS", help="more flags for sample_gd.py")
    seeds = f"one attempt each; default {' '.join(map(str, SEEDS))}, for a target {' '.join(map(str, TARGET_SEEDS))}"
    parser.add_argument("--seeds", type=cli.non_negative_int, nargs="+", help=seeds)
    parser.add_argument("--jobs", type=cli.processes, default=1, help="attempts at once; a record has one")
    parser.add_argument("--output", type=cli.path, help="gets data, runs and rows; default results/speedrun-TRACK")
    parser.add_argument("--source", type=cli.path, default=CLIP_ART, help="for clip-art-64: the folder of the package")
    target = "train the first recipe for the track's steps, and print the mean of what it reaches"
    parser.add_argument("--measure-target", action="store_true", help=target)
    args = parser.parse_args()
    if len(set(args.seeds or ())) < len(args.seeds or ()):
        parser.error("argument --seeds: a seed stands there twice")
    return args


def recipe_of(args: argparse.Namespace, track: Track) -> tuple[str, Recipe]:
    """The recipe that the flags ask for, and its name, which has a + if flags were added.

    Raises:
        UserError: there is no such recipe, or a flag belongs to the track.
    """
    name = args.recipe or track.first
    if name not in track.recipes:
        raise UserError(f"--recipe {name}: {track.name} has {', '.join(track.recipes)}")
    added = args.train_flags.split(), args.sample_flags.split()
    for flags in added:
        for flag in (flag.partition("=")[0] for flag in flags):
            if flag in TRACKS_OWN:
                raise UserError(f"{flag} belongs to the track, so that records can be compared: leave it out")
    recipe = track.recipes[name]
    if args.measure_target and (any(added) or name != track.first):
        raise UserError(
            f"--measure-target measures the recipe {track.first} as it is: leave other recipes and flags out"
        )
    training, sampling = (
        " ".join([old, *new]) for old, new in zip((recipe.training, recipe.sampling), added, strict=True)
    )
    return name + "+" * any(map(bool, added)), Recipe(training, sampling)


def attempts_of(args: argparse.Namespace, track: Track, output: Path) -> list[Attempt]:
    """One attempt for each seed.

    Raises:
        UserError: as `recipe_of`.
    """
    name, recipe = recipe_of(args, track)
    seeds = args.seeds or (TARGET_SEEDS if args.measure_target else SEEDS)
    return [Attempt(track, name, recipe, seed, output / "data", output) for seed in seeds]


def machine() -> dict[str, str]:
    """Where and with what a row is measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = device_name(device) if device.type == "cuda" else f"{processor()}, {device_name(device)}"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return {"machine": where, "versions": versions, "date": date.today().isoformat(), "commit": commit()}


def processor() -> str:
    """The name of the processor, as Linux gives it, or its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit of this code, with a + if files have been changed since; "unknown" outside a repository."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_all(attempts: Sequence[Attempt], run: Callable[[Attempt], object], jobs: int) -> list:
    """The results of all attempts. An error ends those that have not begun."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, attempt) for attempt in attempts]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def add_row(path: Path, row: dict) -> None:
    """Adds a line of JSON to the file of rows, as soon as it is measured."""
    with open_regular(path, append=True) as file:
        file.write((json.dumps(row) + "\n").encode())
    found = f"{row['seconds']:.1f} s, {row['step']} steps" if row["reached"] else "the target is not reached"
    print(f"{row['recipe']}, seed {row['seed']}: {found}", flush=True)


def read_rows(path: Path) -> list[dict]:
    """All rows of a file, the last of each seed.

    Raises:
        UserError: a line is damaged.
    """
    rows = {}
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                rows[(*(row[name] for name in SAME), row["seed"])] = row
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"line {number} of {path} is damaged: remove it") from None
    return list(rows.values())


def groups_of(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows of each line of the table."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SAME), []).append(row)
    return list(groups.values())


def table(track: Track, rows: Sequence[dict]) -> str:
    """The table of all rows: mean and spread over the seeds of a recipe that reached the target."""
    lines, notes = [], []
    for group in groups_of(rows):
        met = [row for row in group if row["reached"]]
        # Without the seeds that did not reach the target, the mean would be too good.
        whole = len(met) == len(group)
        seconds, steps = (
            spread([row.get(name, math.nan) for row in group]) if whole else "–" for name in ("seconds", "step")
        )
        last = [row["tried"][-1] for row in met]
        found = [spread([each[name] for each in last]) if last else "–" for name in QUALITY_NAMES]
        lines.append([group[0]["recipe"], seconds, steps, *found, f"{len(met)} of {len(group)}"])
        where = ", ".join(group[0][name] for name in ("machine", "versions", "date", "commit"))
        jobs = f", {group[0]['jobs']} attempts at once" * (group[0]["jobs"] > 1)
        notes += [f"{group[0]['recipe']}: {where}{jobs}", f"  train.py {track.form} {group[0]['training']}"]
        notes += [f"  sample_gd.py {track.sampling} {group[0]['sampling']}"]
    head = ["recipe", "seconds", "steps", *QUALITY_NAMES.values(), "seeds that reached it"]
    target = ["target", "", "", *(f"{getattr(track.target, name):.4g}" for name in QUALITY_NAMES), ""]
    return "\n".join([markdown(head, [target, *lines]), *notes])


QUALITY_NAMES = {"clip_error": "clip error", "right": "judged right", "frechet": "Fréchet distance", "recall": "recall"}


def spread(values: Sequence[float]) -> str:
    """Mean ± spread."""
    cell = Cell(tuple(values))
    return cell.text(cell)


def draw_curves(path: Path, rows: Sequence[dict]) -> None:
    """Draws the held-out clip error by seconds of training, a line for each seed."""
    series = {
        f"{row['recipe']}, seed {row['seed']}, {row['commit']}": [tuple(point) for point in row["curve"]]
        for row in rows
    }
    write_plots(path, [Lines(series, "seconds of training", "held-out clip error", log_y=True)])


def main() -> None:
    args = parse_args()
    track = TRACKS[args.track]
    output = args.output or Path("results") / f"speedrun-{track.name}"
    attempts = attempts_of(args, track, output)
    if not track.target and not args.measure_target:
        how = f"python EqM/speedrun.py {track.name} --measure-target"
        raise UserError(
            f"nobody has measured the target of {track.name}: run {how}, and put it into EqM/measuring/tracks.py"
        )
    check_plots("a record")
    path = output / "records.jsonl"
    check_writable("--output", path)
    make_data(track, output / "data", args.source)
    if args.measure_target:
        found = run_all(attempts, Attempt.measure, args.jobs)
        for attempt, each in zip(attempts, found, strict=True):
            print(f"seed {attempt.seed}: {each}")
        print(", ".join(machine().values()))
        print(f"target of {track.name}, the mean of {len(found)} seeds after {track.steps} steps:\n{means(found)}")
        return

    def race(attempt: Attempt) -> None:
        add_row(path, attempt.race(track.target) | {"jobs": args.jobs} | machine())

    run_all(attempts, race, args.jobs)
    rows = read_rows(path)
    draw_curves(output / "curve.png", rows)
    print(f"\n{shown_lines(table(track, rows))}\nrecords.jsonl and curve.png are in {shown(output)}")


def shown_lines(text: str) -> str:
    """A text of several lines as a terminal can show it."""
    return "\n".join(map(shown, text.splitlines()))


if __name__ == "__main__":
    cli.run(main, "choose a smaller recipe")
