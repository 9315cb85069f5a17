"""The tracks of records: what the task is, what counts as done, and the recipes. docs/records.md has the rules."""

from dataclasses import dataclass

SPLITS = ("train", "test")
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
