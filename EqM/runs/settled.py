"""The flags of a run once it is known what it goes on from: as they were given, kept by a checkpoint, or by default."""

import argparse
import math

from data.packs.pack import Pack
from data.source import check_pack, packed_flags
from objective import objective_of
from runs.config import Config
from runtime import cli, distributed
from runtime.errors import UserError


def settled_of(
    args: argparse.Namespace, defaults: dict, before: Config | None, pack: Pack | None
) -> argparse.Namespace:
    """All flags: as given, else as the run `before` has them, else by default.

    Raises:
        UserError: flags contradict one another, the pack, or the run.
    """
    kept = kept_of(args, before, pack) if before else {}
    settled = argparse.Namespace(**cli.settled(vars(args), kept, defaults))
    if settled.ebm != "none" and settled.grad_checkpoint:
        raise UserError(f"--grad-checkpoint does not work with --ebm {settled.ebm}: use --micro-batch-size for memory")
    check_pack(settled, pack)
    if settled.video and isinstance(settled.clip_len, tuple) and settled.positions != "rotary":
        lengths = " ".join(map(str, settled.clip_len))
        raise UserError(f"--clip-len {lengths} needs --positions rotary: add it, or give one length")
    if settled.position_stretch > 1 and settled.positions != "rotary":
        raise UserError(f"--position-stretch {settled.position_stretch:g} needs --positions rotary: add it")
    objective_of(settled)
    return settled


def kept_of(args: argparse.Namespace, before: Config, pack: Pack | None) -> dict:
    """What the run `before` says of flags that were not given, as far as it fits those that were.

    Raises:
        UserError: the pack has another form than the run.
    """
    kept = before.kept_flags()
    kept.pop("num_classes")  # the data, and check_resumable, decide
    if args.c_schedule not in (None, "piecewise"):
        kept["c_b"] = None
    if args.gamma_distribution == "uniform":
        kept["gamma_mean"] = kept["gamma_std"] = None
    if args.lr_schedule == "constant":
        kept["decay_steps"] = None
    batch = args.global_batch_size or kept["global_batch_size"]
    if kept["micro_batch_size"] and batch:
        kept["micro_batch_size"] = math.gcd(kept["micro_batch_size"], max(batch // distributed.world_size(), 1))
    if pack:
        check_pack(args, pack)
        settings = pack.settings
        form = {"video": settings.video, "image_size": settings.image_size, **packed_flags(pack)}
        for name, value in form.items():
            if getattr(args, name) is None and kept[name] != value:
                flag = "--" + name.replace("_", "-")
                found = f"{args.data_path} is a pack with {flag} {value}"
                raise UserError(f"the run has {flag} {kept[name]}, and {found}: give another pack")
        if settings.vae:
            kept["vae"] = None  # the pack names its own
    return kept
