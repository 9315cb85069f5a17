"""The config of a run: what a checkpoint says about the network and its training."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from data.form import Form
from data.latents import LatentSpace
from models import NetworkSettings
from objective import DISPERSION_WEIGHT, Objective
from runtime.errors import UserError

# Flags of train.py that a checkpoint keeps under their own names, and the value that a checkpoint without one means.
# These values must never change. The default of a new run stands where a flag is defined.
OLD_MEANINGS = {
    "frame_interval": 1,
    "no_flip": False,
    "lr": 1e-4,
    "warmup_steps": 0,
    "grad_clip": 0.0,
    "ema_decay": 0.9999,
    "micro_batch_size": None,
    "global_seed": 0,
}


@dataclass(frozen=True)
class Config:
    """What a checkpoint says about its run.

    A default is what a checkpoint without this key means. It must never change.

    Attributes:
        classes: the names of the data's classes. The network may know more.
        frames_per_second: mean of the training clips; None for images.
        precision: from Precision.as_dict.
        space: the space of the latents that the network sees; None: pixels.
        global_batch_size: samples of a step over all ranks.
        processes: ranks.
        flags: the flags of train.py, by name.
    """

    network: NetworkSettings
    classes: tuple[str, ...]
    frames_per_second: float | None
    precision: dict
    objective: Objective = field(default_factory=Objective)
    space: LatentSpace | None = None
    global_batch_size: int | None = None
    processes: int | None = None
    flags: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        """As plain data, for checkpoints and config.json."""
        return {
            "network": asdict(self.network),
            "objective": asdict(self.objective),
            "classes": list(self.classes),
            "frames_per_second": self.frames_per_second,
            "precision": self.precision,
            "vae": self.space.as_dict() if self.space else None,
            "global_batch_size": self.global_batch_size,
            "processes": self.processes,
            "args": {name: str(value) if isinstance(value, Path) else value for name, value in self.flags.items()},
        }

    @property
    def form(self) -> Form:
        """The form of the data that the network was trained on, without mirrored samples."""
        pixels = self.space.downsampling if self.space else 1
        interval = self.flags.get("frame_interval", OLD_MEANINGS["frame_interval"]) if self.network.is_video else 1
        return Form(self.network.is_video, self.network.side * pixels, self.network.frames, interval)

    @property
    def seconds_per_frame(self) -> float:
        """Mean seconds between two frames of a training clip; 0 for images."""
        return 1 / self.frames_per_second if self.frames_per_second else 0.0

    @property
    def class_names(self) -> list[str]:
        """The names of all classes that the network knows. The name of a class without data is its index."""
        return [*self.classes, *map(str, range(len(self.classes), self.network.num_classes))]

    def kept_flags(self) -> dict:
        """The flags of the run by name, with the values that train.py reads. None: the run does not use this flag."""
        network, objective = self.network, self.objective
        return {
            **{name: self.flags.get(name, meaning) for name, meaning in OLD_MEANINGS.items()},
            "model": network.model,
            "video": network.is_video,
            "clip_len": network.frames if network.is_video else None,
            "image_size": self.form.image_size,
            "num_classes": network.num_classes,
            "temporal_patch": network.temporal_patch if network.is_video else None,
            "uncond": network.uncond,
            "ebm": network.energy,
            "path_type": objective.path,
            "c_schedule": objective.schedule,
            "c_a": objective.a,
            "c_b": objective.b if objective.schedule == "piecewise" else None,
            "c_lambda": objective.scale,
            "disp": objective.dispersion == DISPERSION_WEIGHT,
            "vae": self.space.name if self.space else "none",
            "global_batch_size": self.global_batch_size,
        }


def config_of(contents: dict, source: str | Path) -> Config:
    """The config from the dict of `Config.as_dict` that the file `source`, a checkpoint or a config.json, holds.

    Raises:
        UserError: a key is missing, or a value has the wrong type.
    """
    try:
        network = dict(contents["network"])
        size = network["input_size"]
        if not isinstance(size, int):
            frames, height, width = size
            network["input_size"] = (frames, height, width)
        space = contents.get("vae")
        return Config(
            network=NetworkSettings(**network),
            classes=tuple(contents["classes"]),
            frames_per_second=contents["frames_per_second"],
            precision=dict(contents["precision"]),
            objective=Objective(**contents.get("objective", {})),
            space=LatentSpace(**space) if space else None,
            global_batch_size=contents.get("global_batch_size"),
            processes=contents.get("processes"),
            flags=dict(contents.get("args", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} holds a config of another program or version: {error}") from None


def check_resumable(saved: Config, ours: Config, path: Path) -> None:
    """Raises UserError, with both values, if a checkpoint does not fit the flags or the data of this run."""

    def described(config: Config) -> dict:
        return {
            **{each.name: getattr(config.network, each.name) for each in fields(config.network)},
            **{f"the objective's {key}": value for key, value in asdict(config.objective).items()},
            "classes": list(config.classes),
            "vae": config.space and config.space.fingerprint,
        }

    theirs = described(saved)
    for key, value in described(ours).items():
        if theirs[key] != value:
            raise UserError(f"{path} was trained with {key} {theirs[key]}, and this run has {value}")
