"""The config of a run: what a checkpoint says about the network and its training."""

from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from data.form import Form
from data.latent_space import LatentSpace
from network_settings import NetworkSettings
from objective import DISPERSION_WEIGHT, Objective
from optimizer import LR_SCHEDULES, OPTIMIZERS
from runtime import cli
from runtime.errors import UserError
from runtime.plain_data import brief_names, one_of, read_as
from runtime.size import ImageSize, Size, sides, size_of

Flag = str | bool | tuple[int, ...] | int | float | None


@dataclass(frozen=True)
class KeptFlags:
    """Flags of train.py that a checkpoint keeps under their own names, and what a checkpoint without one means.

    These values must never change. The default of a new run stands where a flag is defined.
    """

    frame_interval: Annotated[int, cli.positive_int] | tuple[Annotated[int, cli.positive_int], ...] = 1
    no_flip: bool = False
    optimizer: Annotated[str, one_of(OPTIMIZERS)] = "adamw"
    lr: Annotated[float, cli.positive_float] = 1e-4
    warmup_steps: Annotated[int, cli.non_negative_int] = 0
    grad_clip: Annotated[float, cli.non_negative_float] = 0.0
    ema_decay: Annotated[float, cli.fraction] = 0.9999
    class_dropout: Annotated[float, cli.fraction] = 0.1
    position_stretch: Annotated[float, cli.stretch] = 1.0
    lr_schedule: Annotated[str, one_of(LR_SCHEDULES)] = "constant"
    decay_steps: Annotated[int, cli.positive_int] | None = None
    micro_batch_size: Annotated[int, cli.positive_int] | None = None
    global_seed: Annotated[int, cli.seed] = 0


OLD_MEANINGS = asdict(KeptFlags())


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
        class_counts: files of each class; None: not known.
    """

    network: NetworkSettings
    classes: tuple[str, ...]
    frames_per_second: Annotated[float, cli.positive_float] | None
    precision: dict[str, str | bool]
    objective: Objective = field(default_factory=Objective)
    space: LatentSpace | None = field(default=None, metadata={"key": "vae"})
    global_batch_size: Annotated[int, cli.positive_int] | None = None
    processes: Annotated[int, cli.positive_int] | None = None
    flags: dict[str, Flag] = field(default_factory=dict, metadata={"key": "args"})
    class_counts: tuple[Annotated[int, cli.non_negative_int], ...] | None = None

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
            "args": {name: as_plain(value) for name, value in self.flags.items()},
            "class_counts": list(self.class_counts) if self.class_counts else None,
        }

    @property
    def form(self) -> Form:
        """The form of the data that the network was trained on, without mirrored samples."""
        pixels = self.space.downsampling if self.space else 1
        interval = self.flags.get("frame_interval", OLD_MEANINGS["frame_interval"]) if self.network.is_video else 1
        interval = min(interval) if isinstance(interval, tuple) else interval
        clip_len = self.space.clip_len(self.network.frames) if self.space else self.network.frames
        height, width = sides(self.network.size)
        return Form(self.network.is_video, size_of(height * pixels, width * pixels), clip_len, interval)

    def of_size(self, clip_len: int | None, image_size: ImageSize | None) -> "Config":
        """The config of a network with rotary positions, for clips or images of another length and size.

        Args:
            clip_len: frames, as pixels; None: those of the training.
            image_size: pixels; None: that of the training.

        Raises:
            UserError: the patches or the VAE do not take this size.
        """
        form = replace(
            self.form, clip_len=clip_len or self.form.clip_len, image_size=image_size or self.form.image_size
        )
        network = replace(self.network, input_size=form.input_size(self.space))
        network.check()
        return replace(self, network=network)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The clip lengths that training mixes; empty: all clips have the one of the form."""
        kept = self.flags.get("clip_len") if self.network.is_video else None
        return kept if isinstance(kept, tuple) else ()

    @property
    def seconds_per_frame(self) -> float:
        """Mean seconds between two frames that the network sees of a training clip; 0 for images."""
        return self.seconds_at(self.frames_per_second)

    def seconds_at(self, frames_per_second: float | None) -> float:
        """Seconds between two frames that the network sees, for clips of this frame rate; 0 for None, as for images.

        A VAE may make one frame of latents of several frames.
        """
        return self.time_factor / frames_per_second if frames_per_second else 0.0

    @property
    def time_factor(self) -> int:
        """Frames of a clip from one frame that the network sees to the next."""
        return self.space.time_factor if self.space else 1

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
            "clip_len": (self.lengths or self.form.clip_len) if network.is_video else None,
            "image_size": self.form.image_size,
            "num_classes": network.num_classes,
            "temporal_patch": network.temporal_patch if network.is_video else None,
            "positions": network.positions,
            "uncond": network.uncond,
            "predict": "clip" if network.clip_gain else "field",
            "ebm": network.energy,
            "path_type": objective.path,
            "c_schedule": objective.schedule,
            "c_a": objective.a,
            "c_b": objective.b if objective.schedule == "piecewise" else None,
            "c_lambda": objective.scale,
            "gamma_per_frame": objective.by_frame,
            "disp": objective.dispersion == DISPERSION_WEIGHT,
            "loss_weight": objective.loss_weight,
            "gamma_distribution": objective.gamma_distribution,
            "gamma_mean": None if objective.gamma_distribution == "uniform" else objective.gamma_mean,
            "gamma_std": None if objective.gamma_distribution == "uniform" else objective.gamma_std,
            "vae": self.space.name if self.space else "none",
            "global_batch_size": self.global_batch_size,
            "init_weights": self.flags.get("init_weights"),
        }


def as_plain(value: object) -> object:
    """The value of a flag, as plain data."""
    return str(value) if isinstance(value, Path | Size) else list(value) if isinstance(value, tuple) else value


def config_of(contents: object, source: str | Path) -> Config:
    """The config from the dict of `Config.as_dict` that the file `source`, a checkpoint or a config.json, holds.

    Raises:
        UserError: a key is missing or unknown, or a value has the wrong type, is out of range, or contradicts another.
    """
    if isinstance(contents, dict):  # config.json also says who started the run
        contents = {key: value for key, value in contents.items() if key != "launcher"}
    try:
        config = read_as(Config, contents)
        check_together(config)
    except ValueError as error:
        raise UserError(f"{source} holds a config of another program or version: {error}") from None
    return config


def check_together(config: Config) -> None:
    """Raises ValueError if values of a config contradict one another."""
    network, names = config.network, {each.name for each in fields(KeptFlags)}
    read_as(KeptFlags, {name: value for name, value in config.flags.items() if name in names}, "args")
    intervals = config.flags.get("frame_interval")
    if isinstance(intervals, tuple) and (len(intervals) < 2 or sorted(set(intervals)) != list(intervals)):
        raise ValueError(f"args.frame_interval is {intervals}, which is not several numbers in ascending order")
    if network.is_video != (config.frames_per_second is not None):
        raise ValueError(
            f"frames_per_second is {config.frames_per_second}, which does not fit input_size {network.input_size}"
        )
    if network.in_channels != (config.space.channels if config.space else 3):
        raise ValueError(f"network.in_channels is {network.in_channels}, and the data have other channels")
    if lengths := config.lengths:
        ordered = sorted(set(lengths)) == list(lengths) and lengths[0] > 0
        if not ordered or lengths[-1] != config.form.clip_len or network.positions != "rotary":
            raise ValueError(f"args.clip_len is {lengths}, which does not fit the network")
    if config.space:
        config.space.frames(config.form.clip_len)  # more frames than it has statistics for are a UserError
    output = network.clip_gain, network.clip_a, network.clip_b
    if network.clip_gain and output != astuple(config.objective.clip_output):
        raise ValueError(f"network.clip_gain, clip_a and clip_b are {output}, and the objective has another c(γ)")
    if not 0 < len(set(config.classes)) == len(config.classes) <= network.num_classes:
        found = f"{len(config.classes)} names, and network.num_classes is {network.num_classes}"
        raise ValueError(f"classes has {found}: too many, none, or a name twice")
    if config.class_counts and len(config.class_counts) != len(config.classes):
        raise ValueError(f"class_counts has {len(config.class_counts)} numbers for {len(config.classes)} classes")
    if not isinstance(config.precision.get("name"), str):
        raise ValueError("precision has no name")


def check_resumable(saved: Config, ours: Config, path: Path) -> None:
    """Raises UserError, with both values, if a checkpoint does not fit the flags or the data of this run."""
    missing, new = (
        [name for name in these.classes if name not in set(others.classes)]
        for these, others in ((saved, ours), (ours, saved))
    )
    if saved.classes != ours.classes:
        differ = f"these data lack {brief_names(missing)}, and have {brief_names(new)} in addition"
        differ = differ if missing or new else "these data have them in another order"
        advice = "to train on other classes, start a new run with --init-weights"
        raise UserError(f"{path} was trained on other classes: {differ}: {advice}")

    def described(config: Config) -> dict:
        return {
            **{each.name: getattr(config.network, each.name) for each in fields(config.network)},
            **{f"the objective's {key}": value for key, value in asdict(config.objective).items()},
            "vae": config.space and config.space.fingerprint,
            "optimizer": config.flags.get("optimizer", OLD_MEANINGS["optimizer"]),
        }

    theirs = described(saved)
    for key, value in described(ours).items():
        if theirs[key] != value:
            raise UserError(f"{path} was trained with {key} {theirs[key]}, and this run has {value}")
    if saved.space and not saved.space.same_numbers(ours.space):
        numbers = "latents were scaled and shifted by other numbers"
        raise UserError(f"{path} was trained when {numbers}: give the data that it was trained on, or start a new run")


def changed_counts(saved: Config, ours: Config) -> str:
    """The classes whose number of files has changed since a checkpoint, for a warning, or an empty text."""
    if saved.class_counts is None or ours.class_counts is None:
        return ""
    pairs = zip(ours.classes, saved.class_counts, ours.class_counts, strict=True)
    changed = [f"{name} had {before} files and has {after}" for name, before, after in pairs if before != after]
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    return f"the data have changed in {len(changed)} classes: {', '.join(changed[:5])}{more}" if changed else ""
