"""What a study compares, and its trainings. Each training runs the commands that people run."""

import csv
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from measuring.launches import run_logged
from measuring.study_tables import report_values
from runs.config import config_of
from runs.record import read_metrics
from runtime.errors import UserError, first_line
from runtime.files import open_regular, parse_json, read_csv

COMMANDS = Path(__file__).resolve().parent.parent  # the folder of our scripts
PRECISIONS = {"fp32": "", "bf16": "--use-bf16", "fp16": "--use-amp"}
FLOW_MATCHING = "--no-uncond --c-schedule constant --c-lambda 1"


@dataclass(frozen=True)
class Setting:
    """The flags for training and sampling on one kind of data, and how many samples are judged."""

    training: str
    sampling: str
    samples: int


# Keys: whether the data are videos, and whether there is a GPU.
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
class Variants:
    """What a study compares: by name, the flags of each training and of each way to sample from it."""

    trainings: dict[str, str]
    samplings: dict[str, dict[str, str]]


def adaptive_samplings() -> dict[str, str]:
    """Fixed numbers of steps, and norms to stop at. Step size and 250 steps were published for B/2."""
    common = "--stepsize 0.003 --num-sampling-steps"
    fixed = {f"{steps} steps": f"{common} {steps}" for steps in (250, 100, 75)}
    return fixed | {f"G = {g}": f"{common} 250 --adaptive {g}" for g in (0.8, 0.4, 0.2, 0.1)}


def optimizers() -> dict[str, str]:
    """Both optimizers at a constant rate, each with the same search of rates."""
    rates = ("2.5e-4", "5e-4", "1e-3", "2e-3")
    return {
        f"{name}, {rate}": f"--optimizer {flag} --lr {rate} --lr-schedule constant"
        for name, flag in (("AdamW", "adamw"), ("Muon", "muon"))
        for rate in rates
    }


# Today's descent, with the step size published for B/2 as in `adaptive`, and one whose steps are planned.
OF_250_STEPS = "--sampler ngd --stepsize 0.003 --num-sampling-steps 250"
AUTO_STEPS = "--stepsize auto --num-sampling-steps"
STUDIES = {
    "precision": Variants(PRECISIONS, dict.fromkeys(PRECISIONS, PRECISIONS)),
    "objective": Variants(
        {"Equilibrium Matching": "", "flow matching": FLOW_MATCHING},
        {"Equilibrium Matching": {"descent": ""}, "flow matching": {"Euler": "--sampler euler"}},
    ),
    "adaptive": Variants({"Equilibrium Matching": ""}, {"Equilibrium Matching": adaptive_samplings()}),
    "output": Variants(
        {
            "field, patch 4": "--model EqM-S/4 --predict field --c-schedule truncated",
            "clip, patch 8": "--model EqM-S/8 --predict clip --c-schedule truncated",
            "clip, linear, patch 8": "--model EqM-S/8 --predict clip --c-schedule linear",
        },
        {
            "field, patch 4": {"descent": "--stepsize 0.015"},
            "clip, patch 8": {"descent": "--stepsize 0.015"},
            "clip, linear, patch 8": {"descent": "--stepsize 0.03"},
        },
    ),
    "optimizer": Variants(optimizers(), dict.fromkeys(optimizers(), {"descent": ""})),
    "evaluations": Variants(
        {"Equilibrium Matching": ""},
        {"Equilibrium Matching": {"250 steps": OF_250_STEPS, "16 steps, auto": f"{AUTO_STEPS} 16"}},
    ),
}


@dataclass(frozen=True)
class Study:
    """A study: its data, its setting, and the flags that are added to the setting."""

    name: str  # in STUDIES
    data: Path  # a folder with train/
    video: bool
    output: Path  # the folder for everything that the study writes
    seeds: int  # trainings of each variant
    samples: int  # of each variant and seed
    setting: Setting
    train_flags: str
    sample_flags: str
    evaluate_flags: str

    @property
    def variants(self) -> Variants:
        return STUDIES[self.name]

    def trials(self) -> list["Trial"]:
        """All trainings, seed by seed. So a study that is stopped early has compared all variants for some seeds."""
        return [Trial(self, name, seed) for seed in range(self.seeds) for name in self.variants.trainings]


@dataclass(frozen=True)
class Trial:
    """One training of a variant with one seed."""

    study: Study
    training: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.training}-seed{self.seed}".replace(" ", "-")

    def run(self, step: Callable[[], object]) -> None:
        """Trains, then samples and evaluates in each way. Skips what is done already. Calls `step` after each command.

        Raises:
            UserError: a command failed.
        """
        study, setting, variants = self.study, self.study.setting, self.study.variants
        real, runs = study.data / "train", study.output / "runs" / self.name
        flags = [*setting.training.split(), *study.train_flags.split(), *variants.trainings[self.training].split()]
        where = ["--data-path", real, "--results-dir", runs, "--resume"]
        self.call("train", "train.py", *where, "--global-seed", self.seed, "--ckpt-every", 10**6, *flags)
        step()
        checkpoint = max(self.run_folder.glob("checkpoints/*.pt"))
        for name, flags in variants.samplings[self.training].items():
            folder, report = self.samples(name), self.evaluation(name)
            if self.seconds(name) is None:
                drawn = ["--ckpt", checkpoint, "--folder", folder, "--num-fid-samples", study.samples]
                method = [*setting.sampling.split(), *study.sample_flags.split(), *flags.split()]
                self.call(f"sample-{name}", "sample_gd.py", *drawn, "--global-seed", 1000 + self.seed, *method)
            step()
            if not self.report(name):
                flags = ["--judge", "--output", report, *study.evaluate_flags.split()]
                self.call(f"evaluate-{name}", "evaluate.py", real, folder, *flags)
            step()

    @property
    def run_folder(self) -> Path:
        return max((self.study.output / "runs" / self.name).glob("*-EqM-*"))

    def samples(self, sampling: str) -> Path:
        return self.study.output / "samples" / f"{self.name}-{sampling}".replace(" ", "-")

    def evaluation(self, sampling: str) -> Path:
        return self.study.output / "evaluations" / f"{self.name}-{sampling}.json".replace(" ", "-")

    def seconds(self, sampling: str) -> float | None:
        """How long sampling took, from the sampler's log; None until sampling is done."""
        log = self.log(f"sample-{sampling}")
        found = re.search(rb"\d+ samples in (\d+\.?\d*) s: ", read_bytes(log) if log.exists() else b"")
        return float(found[1]) if found else None

    def report(self, sampling: str) -> dict[str, float]:
        """What the evaluation found, by name; empty until it is done, and if its report is damaged."""
        path = self.evaluation(sampling)
        if not path.exists():
            return {}
        try:
            return report_values(parse_json(path))
        except (OSError, AttributeError, KeyError, OverflowError, TypeError, ValueError):
            tqdm.write(f"{path} is damaged: it is made again")
            return {}

    def qualities(self, sampling: str) -> dict[str, float]:
        """What was measured of the samples, by name.

        Raises:
            UserError: the table of the samples is damaged.
        """
        table = self.samples(sampling) / "samples.csv"
        try:
            evaluations = statistics.mean(int(row["evaluations"]) for row in read_csv(table))
        except (OSError, csv.Error, ValueError, KeyError, TypeError):
            log = self.log(f"sample-{sampling}")
            raise UserError(f"{table} is damaged: remove {table.parent} and {log}, then repeat this command") from None
        found = {"evaluations": evaluations, "seconds": self.seconds(sampling)}
        return found | training_qualities(self.run_folder) | self.report(sampling)

    def precision(self) -> str:
        """In what the training computed. Where the hardware lacks a precision, that is fp32."""
        path = self.run_folder / "config.json"
        return config_of(read_contents(path), path).precision["name"]

    def log(self, name: str) -> Path:
        return self.study.output / "logs" / f"{self.name}-{name}.txt".replace(" ", "-")

    def call(self, name: str, script: str, *flags: object) -> None:
        """Runs one of our scripts, and writes its output into a log file.

        Raises:
            UserError: it failed.
        """
        log = self.log(name)
        for folder in (self.study.output / "samples", self.study.output / "evaluations"):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            run_logged(log, COMMANDS / script, *flags)
        except UserError as error:
            raise UserError(f"{error}, then repeat this command to go on") from None


def training_qualities(run: Path) -> dict[str, float]:
    """What a run's metrics say: the time of a step, and the last held-out clip error if there is one.

    The time is that after the second line, so that neither compiling nor the first steps count; NaN for a short run.

    Raises:
        UserError: the run has no metrics.
    """
    rows = read_metrics(run, ("step",), ("training_seconds", "held_out_clip_error"))
    timed = [row for row in rows if "training_seconds" in row][1:]
    steps = timed[-1]["step"] - timed[0]["step"] if timed else 0
    seconds = timed[-1]["training_seconds"] - timed[0]["training_seconds"] if timed else 0
    errors = [row["held_out_clip_error"] for row in rows if "held_out_clip_error" in row]
    found = {"ms a training step": 1000 * seconds / steps if steps else math.nan}
    return found | ({"held-out clip error": errors[-1]} if errors else {})


def read_contents(path: Path) -> object:
    """The contents of a JSON file of a study.

    Raises:
        UserError: it is damaged or cannot be read.
    """
    try:
        return parse_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): remove it, then repeat this command") from None


def read_bytes(path: Path) -> bytes:
    """All bytes of a regular file."""
    with open_regular(path) as file:
        return file.read()
