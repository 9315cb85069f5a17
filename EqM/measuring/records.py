"""Records: the data of a task, and one attempt at it. docs/records.md has the rules."""

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from measuring.launches import run_logged
from measuring.study_tables import report_values
from measuring.tracks import SPLITS, Qualities, Recipe, Track
from runs.record import read_metrics
from runtime.errors import UserError
from runtime.files import parse_json

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = {"train": "train.py", "sample": "sample_gd.py", "evaluate": "evaluate.py"}


def make_data(track: Track, folder: Path, source: Path) -> None:
    """Makes the data of a track, unless they are there.

    Raises:
        UserError: a command failed.
    """
    done = folder / "made.txt"
    commands = [command.format(data=folder, source=source) for command in track.data]
    if done.exists() and done.read_text() == "\n".join(commands):
        return
    for i, command in enumerate(track.data):
        script, *flags = command.split()
        run_logged(folder / f"log{i}.txt", ROOT / script, *(flag.format(data=folder, source=source) for flag in flags))
    done.write_text("\n".join(commands))


@dataclass(frozen=True)
class Attempt:
    """One training of a recipe with one seed.

    Attributes:
        name: of the recipe.
        output: the folder for everything but the data.
    """

    track: Track
    name: str
    recipe: Recipe
    seed: int
    data: Path
    output: Path

    @property
    def folder(self) -> Path:
        return self.output / f"{self.name}-seed{self.seed}"

    def train(self, *more: object) -> list[dict[str, float]]:
        """Trains anew, with more flags. Returns the lines of metrics that have a held-out clip error.

        Raises:
            UserError: it failed, or there is no clip error.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        track, splits = self.track, [self.data / f"{split}-pack" for split in SPLITS]
        where = ["--data-path", splits[0], "--eval-path", splits[1], "--results-dir", self.folder / "runs"]
        often = ["--eval-every", track.every, "--eval-samples", track.held_out, "--ckpt-every", track.every]
        flags = [*track.form.split(), "--log-every", track.every, "--global-seed", self.seed]
        # Compiling is a part of the time, so no attempt finds what an earlier one has compiled.
        names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        caches = {name: str((self.folder / folder).resolve()) for name, folder in names.items()}
        self.call("train", *where, *often, *flags, *self.recipe.training.split(), *more, variables=caches)
        for folder in caches.values():
            shutil.rmtree(folder, ignore_errors=True)
        rows = read_metrics(self.run, ("step", "training_seconds"), ("held_out_clip_error",))
        rows = [row for row in rows if "held_out_clip_error" in row]
        if not rows:
            raise UserError(
                f"{self.run} has no held_out_clip_error: take a --path-type and a --c-schedule that have it"
            )
        return rows

    def call(self, name: str, *flags: object, variables: dict[str, str] | None = None) -> None:
        """Runs train.py, sample_gd.py or evaluate.py, by the first word of the log's name."""
        script = ROOT / "EqM" / SCRIPTS[name.split("-")[0]]
        run_logged(self.folder / "logs" / f"{name}.txt", script, *flags, variables=variables)

    @property
    def run(self) -> Path:
        return max((self.folder / "runs").glob("*-EqM-*"))

    def judge(self, row: dict[str, float]) -> Qualities:
        """Samples from the checkpoint of a line of metrics, and evaluates.

        Raises:
            UserError: a command failed.
        """
        step, track = int(row["step"]), self.track
        samples, report = self.folder / f"samples-{step}", self.folder / f"evaluation-{step}.json"
        drawn = ["--ckpt", self.run / "checkpoints" / f"{step:07d}.pt", "--folder", samples]
        drawn += ["--num-fid-samples", track.samples, "--global-seed", 1000 + self.seed, *track.sampling.split()]
        self.call(f"sample-{step}", *drawn, *self.recipe.sampling.split())
        self.call(f"evaluate-{step}", self.data / "train-pack", samples, "--judge", "--output", report)
        found = report_values(parse_json(report))
        (frechet,), (recall,) = (
            [value for name, value in found.items() if name.startswith(what)] for what in ("Fréchet", "recall")
        )
        right = found["both right"] if "both right" in found else found["class right"]
        return Qualities(row["held_out_clip_error"], right, frechet, recall)

    def measure(self) -> Qualities:
        """What the recipe reaches after the track's steps."""
        return self.judge(self.train("--max-steps", self.track.steps)[-1])

    def race(self, target: Qualities) -> dict:
        """Trains, and finds the first checkpoint that meets the target. Returns the row of the record as plain data.

        Only checkpoints that meet the target's clip error are sampled, the earliest first.
        """
        start = time.perf_counter()
        rows, tried, met = self.train(), [], None
        for row in rows:
            if row["held_out_clip_error"] > target.clip_error:
                continue
            found = self.judge(row)
            tried.append({"step": int(row["step"])} | asdict(found) | {"missed": found.missed(target)})
            if not tried[-1]["missed"]:
                met = row
                break
        for path in self.run.glob("checkpoints/*.pt"):  # each is twelve times as large as a network in bf16
            if not met or int(path.stem) != met["step"]:
                path.unlink()
        reached = {"step": int(met["step"]), "seconds": met["training_seconds"]} if met else {}
        curve = [(row["training_seconds"], row["held_out_clip_error"]) for row in rows]
        about = {"track": self.track.name, "recipe": self.name, "seed": self.seed, **asdict(self.recipe)}
        whole = round(time.perf_counter() - start, 1)
        return about | {"reached": bool(met)} | reached | {"whole_seconds": whole, "tried": tried, "curve": curve}


def means(found: Sequence[Qualities]) -> Qualities:
    """The mean of each quality."""
    return Qualities(*(statistics.mean(getattr(each, field.name) for each in found) for field in fields(Qualities)))
