"""Records: fixed tasks, what counts as done, and one attempt at a task. docs/records.md has the rules."""

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from measuring.launches import run_logged
from measuring.study_tables import report_values
from runs.record import read_metrics
from runtime.errors import UserError
from runtime.files import parse_json

ROOT = Path(__file__).resolve().parent.parent.parent
SPLITS = ("train", "test")
SCRIPTS = {"train": "train.py", "sample": "sample_gd.py", "evaluate": "evaluate.py"}
# Flags that the track sets, so that no recipe changes the task, what a sample costs, or what is measured.
TRACKS_OWN = (
    *("--data-path", "--results-dir", "--global-seed", "--video", "--image-size", "--clip-len", "--frame-interval"),
    *("--vae", "--eval-path", "--eval-every", "--eval-samples", "--ckpt-every", "--log-every", "--keep", "--keep-best"),
    *("--max-minutes", "--ckpt", "--resume", "--init-weights", "--sample-every"),
    *("--folder", "--num-fid-samples", "--num-sampling-steps", "--init", "--class", "--compose"),
)


@dataclass(frozen=True)
class Qualities:
    """What a network reached, or has to reach.

    Attributes:
        clip_error: held-out clip error, in squares of pixels in [−1, 1].
        right: share of samples that the judge finds right, in shape and direction if classes have both.
        frechet: Fréchet distance of `pixels` features from the training data.
        recall: share of the training data that lies within the neighbourhoods of samples.
    """

    clip_error: float
    right: float
    frechet: float
    recall: float

    def missed(self, target: "Qualities") -> list[str]:
        """The names of the qualities that are worse than the target's."""
        lower, higher = ("clip_error", "frechet"), ("right", "recall")
        missed = [name for name in lower if not getattr(self, name) <= getattr(target, name)]
        return missed + [name for name in higher if not getattr(self, name) >= getattr(target, name)]


@dataclass(frozen=True)
class Recipe:
    """The flags of a recipe for train.py and for sample_gd.py."""

    training: str
    sampling: str


@dataclass(frozen=True)
class Track:
    """A task.

    Attributes:
        data: the commands that make its data, with {data} for their folder and {source} for --source.
        form: flags of train.py that say how data are read.
        steps: after so many steps of the first recipe the target was measured.
        every: steps between held-out losses, each with a checkpoint.
        held_out: files of the held-out loss.
        samples: how many are judged.
        sampling: flags of sample_gd.py that say what a sample costs.
        recipes: by name. The first one sets the target.
        target: None: nobody has measured it.
    """

    name: str
    data: tuple[str, ...]
    form: str
    steps: int
    every: int
    held_out: int
    samples: int
    sampling: str
    recipes: dict[str, Recipe]
    target: Qualities | None = None

    @property
    def first(self) -> str:
        return next(iter(self.recipes))


ADAMW = "--ebm none --uncond --loss-weight field --gamma-distribution uniform --positions fixed --optimizer adamw"
FIELD = (
    f"--path-type Linear --c-schedule truncated --c-a 0.8 --c-lambda 4 --predict field {ADAMW}"
    " --lr-schedule constant --warmup-steps 100 --grad-clip 1"
)


def adamw(network: str, steps: int, guidance: float) -> Recipe:
    """AdamW at a constant rate, for twice the steps of the target: half of the seeds reach their mean only later."""
    return Recipe(
        f"--model EqM-S/4 {network} --lr 5e-4 --ema-decay 0.998 --max-steps {steps} --use-bf16 {FIELD}",
        f"--sampler ngd --mu 0.3 --stepsize 0.015 --cfg-scale {guidance} --use-bf16",
    )


# Small enough for a test: 4 tokens, wider than the network, so that it has to put out the clip.
SHAPES_CPU = Recipe(
    "--model EqM-Ti/4 --temporal-patch 4 --global-batch-size 16 --lr 1e-3 --ema-decay 0.97 --max-steps 500"
    f" --path-type Linear --c-schedule linear --c-lambda 4 --predict clip {ADAMW}"
    " --lr-schedule constant --warmup-steps 20 --grad-clip 1",
    "--sampler ngd --mu 0.3 --stepsize 0.07 --cfg-scale 2",
)


def shapes_data(size: int, flags: str, packed: int | None = None) -> tuple[str, ...]:
    """The commands that render moving shapes, of a side in pixels, and pack them, of the same side or another one."""
    side = packed or size
    packs = (f"EqM/prepare.py {{data}}/{split} {{data}}/{split}-pack --video --image-size {side}" for split in SPLITS)
    return f"datasets/make_moving_shapes.py {{data}} --size {size} --seed 0 {flags}", *packs


TRACKS = {
    track.name: track
    for track in (
        Track(
            name="shapes-32",
            data=shapes_data(32, "--frames 16 --train-clips 150 --test-clips 40"),
            form="--video --clip-len 8 --frame-interval 2 --image-size 32 --no-flip",
            steps=8000,  # fewer, and compiling would be a large part of the time
            every=500,
            held_out=480,
            samples=960,
            sampling="--num-sampling-steps 40 --global-batch-size 120",
            recipes={"adamw": adamw("--temporal-patch 2 --global-batch-size 32", 16000, 2)},
            target=Qualities(clip_error=0.008245, right=0.99931, frechet=0.19784, recall=0.90778),
        ),
        Track(
            name="shapes-64",
            data=shapes_data(64, "--frames 16 --train-clips 150 --test-clips 40"),
            form="--video --clip-len 16 --frame-interval 1 --image-size 64 --no-flip",
            steps=1500,
            every=125,
            held_out=480,
            samples=960,
            sampling="--num-sampling-steps 40 --global-batch-size 60",
            recipes={"adamw": adamw("--temporal-patch 2 --global-batch-size 32", 3000, 2)},
        ),
        Track(
            name="clip-art-64",
            data=(
                "datasets/make_clip_art.py {source} {data} --size 64",
                *(f"EqM/prepare.py {{data}}/{split} {{data}}/{split}-pack --image-size 64" for split in SPLITS),
            ),
            form="--image-size 64",
            steps=2500,
            every=250,
            held_out=279,
            samples=1100,
            sampling="--num-sampling-steps 40 --global-batch-size 220",
            recipes={"adamw": adamw("--global-batch-size 64", 5000, 1.5)},
        ),
        Track(
            name="cpu",
            data=shapes_data(16, "--frames 16 --shapes circle --train-clips 60 --test-clips 8", packed=8),
            form="--video --clip-len 4 --frame-interval 3 --image-size 8 --no-flip",
            steps=400,
            every=100,
            held_out=32,
            samples=96,
            sampling="--num-sampling-steps 16 --global-batch-size 96",
            recipes={"adamw": SHAPES_CPU},
            # Easy, and no mean: it shows that the command works. Seed 1 had 0.0404, 99%, 1.14 and 24% after its steps.
            target=Qualities(clip_error=0.05, right=0.8, frechet=2.0, recall=0.1),
        ),
    )
}


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
