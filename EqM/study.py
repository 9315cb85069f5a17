"""Trains variants of one model with several seeds, samples and evaluates each, and tabulates their quality.

    python EqM/study.py precision datasets/moving-shapes --video    # fp32, bf16 and fp16, trained and sampled
    python EqM/study.py objective datasets/moving-shapes --video    # Equilibrium Matching and flow matching
    python EqM/study.py adaptive datasets/fashion-mnist             # quality against evaluations

DATA has a folder train/, with which samples are also compared. Everything is done by the commands that people
use, which are printed. Stop the study when you like: the same command goes on where it was. On a CPU it is a
small version of itself.
"""

import argparse
import csv
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from drawing.pictures import write_png
from measuring.study_tables import Cell, loss_curves, quality_by_evaluations, tables
from runs.record import read_metrics
from runtime import cli
from runtime.errors import UserError
from runtime.logs import device_name

HERE = Path(__file__).resolve().parent
PRECISIONS = {"fp32": "", "bf16": "--use-bf16", "fp16": "--use-amp"}
FLOW_MATCHING = "--no-uncond --c-schedule constant --c-lambda 1"


@dataclass(frozen=True)
class Setting:
    """How one kind of data is trained on and sampled, as flags, and how many samples are judged."""

    training: str
    sampling: str
    samples: int


# By whether the data are videos, and whether there is a GPU.
SETTINGS = {
    (True, True): Setting(
        "--video --clip-len 4 --image-size 32 --temporal-patch 2 --model EqM-S/4 --global-batch-size 32 --lr 5e-4"
        " --max-steps 3000 --no-flip --warmup-steps 100 --grad-clip 1 --ema-decay 0.998 --log-every 100",
        "--stepsize 0.015 --num-sampling-steps 40 --cfg-scale 2 --global-batch-size 120",
        480,
    ),
    (True, False): Setting(
        "--video --clip-len 4 --image-size 16 --temporal-patch 4 --model EqM-Ti/2 --global-batch-size 16 --lr 1e-3"
        " --max-steps 1500 --no-flip --warmup-steps 100 --grad-clip 1 --ema-decay 0.995 --log-every 50",
        "--stepsize 0.006 --num-sampling-steps 100 --cfg-scale 2 --global-batch-size 64",
        192,
    ),
    (False, True): Setting(
        "--image-size 28 --model EqM-S/4 --global-batch-size 64 --lr 5e-4 --max-steps 2500 --no-flip"
        " --warmup-steps 100 --grad-clip 1 --ema-decay 0.998 --log-every 100",
        "--stepsize 0.015 --num-sampling-steps 40 --cfg-scale 1.5 --global-batch-size 250",
        1000,
    ),
    (False, False): Setting(
        "--image-size 28 --model EqM-Ti/4 --global-batch-size 16 --lr 1e-3 --max-steps 1500 --no-flip"
        " --warmup-steps 100 --grad-clip 1 --ema-decay 0.995 --log-every 50",
        "--stepsize 0.006 --num-sampling-steps 100 --cfg-scale 1.5 --global-batch-size 64",
        200,
    ),
}


@dataclass(frozen=True)
class Study:
    """Variants: the flags of each training, and of each way to sample from it, by name."""

    trainings: dict[str, str]
    samplings: dict[str, dict[str, str]]


def adaptive_samplings() -> dict[str, str]:
    """Fixed numbers of steps, and norms to stop at, of the step size published for B/2; 250 are its fixed steps."""
    common = "--stepsize 0.003 --num-sampling-steps"
    fixed = {f"{steps} steps": f"{common} {steps}" for steps in (250, 100, 75)}
    return fixed | {f"G = {g}": f"{common} 250 --adaptive {g}" for g in (0.8, 0.4, 0.2, 0.1)}


STUDIES = {
    "precision": Study(PRECISIONS, dict.fromkeys(PRECISIONS, PRECISIONS)),
    "objective": Study(
        {"Equilibrium Matching": "", "flow matching": FLOW_MATCHING},
        {"Equilibrium Matching": {"descent": ""}, "flow matching": {"Euler": "--sampler euler"}},
    ),
    "adaptive": Study({"Equilibrium Matching": ""}, {"Equilibrium Matching": adaptive_samplings()}),
}


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Trains, samples and evaluates variants of one model, and tabulates their quality.")
    parser.add_argument("study", choices=STUDIES, help="what varies")
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder with train/ of class folders")
    parser.add_argument("--video", action="store_true", help="the data are videos")
    parser.add_argument("--output", type=Path, help="gets everything; default results/study-STUDY-DATA")
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help="trainings of each variant")
    parser.add_argument("--jobs", type=cli.positive_int, default=1, help="trainings at once; small ones idle a GPU")
    parser.add_argument("--train-flags", default="", metavar="FLAGS", help="more of them, as one text, for train.py")
    parser.add_argument("--sample-flags", default="", metavar="FLAGS", help="more of them for sample_gd.py")
    parser.add_argument("--evaluate-flags", default="", metavar="FLAGS", help="more of them for evaluate.py")
    parser.add_argument("--samples", type=cli.positive_int, help="of each variant and seed")
    args = parser.parse_args()
    args.output = args.output or Path("results") / f"study-{args.study}-{args.data.resolve().name}"
    if not (args.data / "train").is_dir():
        raise UserError(f"{args.data} has no folder train: name a data set that datasets/README.md makes")
    return args


@dataclass(frozen=True)
class Trial:
    """One training of a variant with one seed."""

    args: argparse.Namespace
    setting: Setting
    training: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.training}-seed{self.seed}".replace(" ", "-")

    def run(self, step: Callable[[], object]) -> None:
        """Trains, then samples and evaluates in each way, what is not done yet; calls `step` after each command."""
        args, study = self.args, STUDIES[self.args.study]
        data = ["--data-path", args.data / "train", "--results-dir", args.output / "runs" / self.name, "--resume"]
        flags = [*self.setting.training.split(), *args.train_flags.split(), *study.trainings[self.training].split()]
        self.call("train", "train.py", *data, "--global-seed", self.seed, "--ckpt-every", 10**6, *flags)
        step()
        checkpoint = max(self.run_folder.glob("checkpoints/*.pt"))
        for name, flags in study.samplings[self.training].items():
            folder, report = self.samples(name), self.evaluation(name)
            if self.seconds(name) is None:
                drawn = ["--ckpt", checkpoint, "--folder", folder, "--num-fid-samples", args.samples]
                method = [*self.setting.sampling.split(), *args.sample_flags.split(), *flags.split()]
                self.call(f"sample-{name}", "sample_gd.py", *drawn, "--global-seed", 1000 + self.seed, *method)
            step()
            if not report.exists():
                flags = ["--judge", "--output", report, *args.evaluate_flags.split()]
                self.call(f"evaluate-{name}", "evaluate.py", args.data / "train", folder, *flags)
            step()

    @property
    def run_folder(self) -> Path:
        return max((self.args.output / "runs" / self.name).glob("*-EqM-*"))

    def samples(self, sampling: str) -> Path:
        return self.args.output / "samples" / f"{self.name}-{sampling}".replace(" ", "-")

    def evaluation(self, sampling: str) -> Path:
        return self.args.output / "evaluations" / f"{self.name}-{sampling}.json".replace(" ", "-")

    def seconds(self, sampling: str) -> float | None:
        """How long sampling took, as the sampler says when it is done."""
        log = self.log(f"sample-{sampling}")
        found = re.search(r"\d+ samples in ([\d.]+) s: ", log.read_text() if log.exists() else "")
        return float(found[1]) if found else None

    def log(self, name: str) -> Path:
        return self.args.output / "logs" / f"{self.name}-{name}.txt".replace(" ", "-")

    def call(self, name: str, script: str, *flags: object) -> None:
        """Runs one of our scripts, and keeps what it prints.

        Raises:
            UserError: it failed.
        """
        command = [sys.executable, str(HERE / script), *map(str, flags)]
        log = self.log(name)
        for folder in (log.parent, self.args.output / "samples", self.args.output / "evaluations"):
            folder.mkdir(parents=True, exist_ok=True)
        tqdm.write(shlex.join(["python", f"EqM/{script}", *map(str, flags)]))
        with log.open("w") as file:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if status:
            raise UserError(f"{script} ended with status {status}: its words are in {log}; the same command goes on")


def trials(args: argparse.Namespace, setting: Setting) -> list[Trial]:
    """Every training; seeds vary slowest, so that a study that is stopped has whole ones."""
    return [Trial(args, setting, name, seed) for seed in range(args.seeds) for name in STUDIES[args.study].trainings]


def report_values(report: dict) -> dict[str, float]:
    """Each metric of a report of EqM/evaluate.py, NaN where it was left out, and the shares that are right."""
    metrics = {
        f"{metric['metric']}, {comparison['features']}": metric.get("value", math.nan)
        for comparison in report["comparisons"]
        for metric in comparison["metrics"]
    }
    return metrics | {f"{part} right": found["share"] for part, found in report["judge"]["generated"].items()}


def qualities(trial: Trial, sampling: str) -> dict[str, float]:
    """What was measured of one trial's samples, by name."""
    report = json.loads(trial.evaluation(sampling).read_text())
    with (trial.samples(sampling) / "samples.csv").open() as file:
        evaluations = [int(row["evaluations"]) for row in csv.DictReader(file)]
    known = {"evaluations": statistics.mean(evaluations), "seconds": trial.seconds(sampling)}
    return known | report_values(report)


def collect(done: list[Trial], study: Study) -> dict[tuple[str, str], dict[str, Cell]]:
    """By (training, sampling) the cell of each quality."""
    cells = {}
    for training, samplings in study.samplings.items():
        for sampling in samplings:
            seeds = [qualities(trial, sampling) for trial in done if trial.training == training]
            cells[training, sampling] = {name: Cell(tuple(found[name] for found in seeds)) for name in seeds[0]}
    return cells


def write_report(args: argparse.Namespace, done: list[Trial], setting: Setting) -> None:
    """Writes and prints the tables, and draws the curves."""
    study = STUDIES[args.study]
    cells = collect(done, study)
    where = f"{device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}, torch {torch.__version__}"
    settings = f"train.py {setting.training} {args.train_flags}; sample_gd.py {setting.sampling} {args.sample_flags}"
    head = f"{args.study}: {args.data}, {where}, {date.today()}; {args.seeds} seeds, {args.samples} samples of each"
    # What the hardware cannot do falls back to fp32, and is no variant then.
    configs = {trial.training: json.loads((trial.run_folder / "config.json").read_text()) for trial in done}
    computed = ", ".join(f"{name} in {config['precision']['name']}" for name, config in configs.items())
    text = "\n".join([head, "", settings, "", f"computed: {computed}", "", *tables(cells)])
    (args.output / "report.md").write_text(text)
    rows = [{"trained": t, "sampled": s} | {n: c.known() for n, c in row.items()} for (t, s), row in cells.items()]
    (args.output / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [(trial.training, read_metrics(trial.run_folder, ("step", "loss"))) for trial in done]
    runs = {name: [rows for training, rows in lines if training == name] for name in study.trainings}
    write_png(args.output / "loss.png", loss_curves(runs))
    if args.study == "adaptive":
        for name in (name for name in next(iter(cells.values())) if name not in ("evaluations", "seconds")):
            path = args.output / f"{name}-by-evaluations.png".replace(" ", "-")
            write_png(path, quality_by_evaluations(cells, name))
    print(f"\n{text}\nreport.md, report.json and pictures are in {args.output}")


def check_settings(args: argparse.Namespace, setting: Setting) -> None:
    """Notes in the study's folder how it is made; more seeds can be added to it.

    Raises:
        UserError: what is there was made otherwise.
    """
    names = ("study", "data", "video", "samples", "train_flags", "sample_flags", "evaluate_flags")
    ours = {name: str(getattr(args, name)) for name in names} | asdict(setting)
    path = args.output / "settings.json"
    if path.exists() and json.loads(path.read_text()) != ours:
        raise UserError(f"{args.output} holds a study with other flags, data or device: name another --output")
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ours, indent=1) + "\n")


def main() -> None:
    args = parse_args()
    setting = SETTINGS[args.video, torch.cuda.is_available()]
    args.samples = args.samples or setting.samples
    check_settings(args, setting)
    todo, study = trials(args, setting), STUDIES[args.study]
    commands = sum(1 + 2 * len(study.samplings[trial.training]) for trial in todo)
    with tqdm(total=commands, unit="command") as bar, ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(trial.run, bar.update) for trial in todo]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_report(args, todo, setting)


if __name__ == "__main__":
    cli.run(main, "the commands' own words are in the logs")
