"""Packs a data set: decodes every video or image once, into a folder that training reads at full speed.

    python EqM/prepare.py datasets/ucf-101/train datasets/ucf-101-pack --video --vae ema

Safe to interrupt: the same command goes on. It also mends a damaged pack. The source may be class folders, tar shards,
parquet files, an .npz, or videos with a list.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import os
import re
import time

from tqdm import tqdm

from data.form import Form
from data.inputs.forms import Reading
from data.latent_space import LatentSpace
from data.latents import DEFAULT_SIZE, DEFAULT_VAE_SIZE, load_vae
from data.packs.format import Windows
from data.packs.pack import read_pack
from data.packs.packing import begin_pack, finish, lock_pack, missing_shards, read_shard_records
from data.packs.plan import PackPlan, plan_pack
from data.packs.workers import pack_shards
from runtime import cli, distributed, environment
from runtime.errors import UserError, shown
from runtime.size import SIZE_HELP


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Decodes a data set once, into a pack for EqM/train.py.")
    forms = "class folders, videos with a CSV, tar shards or parquet files (their folder, or a quoted pattern), an .npz"
    parser.add_argument("source", type=cli.path, help=forms)
    parser.add_argument("pack", type=cli.path, help="gets the pack: a new folder, or a pack to go on with or to mend")
    parser.add_argument("--video", action="store_true", help="pack videos, not images")
    parser.add_argument(
        "--image-size",
        type=cli.size,
        help=f"{SIZE_HELP}; default {DEFAULT_SIZE}, with a VAE {DEFAULT_VAE_SIZE}",
    )
    parser.add_argument(
        "--vae", default="none", type=cli.given, metavar="{none,ema,mse,DIR}", help="pack latents of this VAE"
    )
    clips = parser.add_argument_group("for a VAE that compresses time: it encodes these clips of each video whole")
    clips.add_argument("--clip-len", type=cli.side, help="frames of a clip")
    clips.add_argument(
        "--frame-interval", type=cli.positive_int, help="video frames from one of a clip to the next; default 3"
    )
    clips.add_argument("--windows", type=cli.side, help="clips of a video, evenly spread; default 4")
    parser.add_argument(
        "--num-workers", type=cli.processes, help="processes a rank (threads if a GPU encodes); default all cores"
    )
    share = "pack share K of N, as one of N machines; the last one joins the pack"
    parser.add_argument("--part", type=part, metavar="K/N", help=share)
    append = "add those files that a whole pack lacks, as new shards; its classes keep their numbers"
    parser.add_argument("--append", action="store_true", help=append)
    source = parser.add_argument_group("how the source is read")
    lists = (
        "a list of files and classes: of UCF-101 (.txt), as of Kinetics (.csv), or as of Something-Something (.json)"
    )
    source.add_argument("--labels", type=cli.path, metavar="FILE", help=lists)
    label = "the field of .json labels, or the column of parquet, that holds classes"
    source.add_argument("--label", type=cli.given, metavar="NAME", default=Reading.label, help=label)
    column = "the column of parquet that holds files; default image, with --video video"
    source.add_argument("--column", type=cli.given, metavar="NAME", help=column)
    fps = "frames a second of the clips of an .npz"
    source.add_argument("--fps", type=cli.frame_rate, default=Reading.frames_per_second, help=fps)
    order = "of an archive's items: by class and name, as class folders have, or as they are stored"
    source.add_argument("--order", choices=("name", "stored"), default="name", help=order)
    return parser.parse_args()


def windows_of(args: argparse.Namespace, space: LatentSpace | None) -> Windows | None:
    """Which clips to pack; None to pack all frames.

    Raises:
        UserError: the flags of clips are missing, or are not for these data.
    """
    given = {name: getattr(args, name) for name in ("clip_len", "frame_interval", "windows")}
    if not (args.video and space and space.time_factor > 1):
        flag = next((f"--{name.replace('_', '-')}" for name, value in given.items() if value), None)
        if flag:
            raise UserError(f"{flag} is for videos and a VAE that compresses time: leave it out, a pack has all frames")
        return None
    if not args.clip_len:
        lengths = ", ".join(str(space.clip_len(frames)) for frames in (3, 4, 5))
        raise UserError(f"the VAE {space.name} encodes clips whole: give --clip-len, such as {lengths}")
    return Windows(args.clip_len, args.frame_interval or 3, args.windows or 4)


def part(text: str) -> tuple[int, int]:
    """An argparse type for K/N, as (K, N)."""
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text, re.ASCII)
    numbers = tuple(map(int, found.groups())) if found else (0, 0)
    if not 0 < numbers[0] <= numbers[1]:
        raise argparse.ArgumentTypeError(f"{text[: cli.SHOWN_LETTERS]!r} is not K/N, as 1/4 to 4/4 on four machines")
    return numbers


def reading_of(args: argparse.Namespace) -> Reading:
    """How the flags want the source read."""
    return Reading(args.labels, args.label, args.column, args.fps, args.order == "stored")


def report(args: argparse.Namespace, left: int, packed: int, seconds: float) -> None:
    """Prints what the pack holds, or how many shards are left, and how fast this run packed its items."""
    kind = "clips" if args.video else "images"
    if left:
        part, parts = args.part
        print(f"part {part} of {parts} is done: other parts have {left} shards left, and the last one joins the pack")
    else:
        pack = read_pack(args.pack)
        for path, reason in pack.found().unreadable:
            print(shown(f"skipped unreadable {path}: {reason}"))
        found = f"{len(pack):,} {kind} of {len(pack.classes)} classes, {pack.count_text()}"
        size = f"{pack.num_bytes():,} bytes, {len(pack.unreadable)} unreadable files skipped"
        print(f"{pack.folder} is whole: {found}, {size}")
        for line in pack.latent_report():
            print(line)
    if packed:
        print(f"packed {packed:,} {kind} in {seconds:.1f} s: {packed / seconds:.1f} a second")


def planned(
    args: argparse.Namespace, form: Form, space: LatentSpace | None, windows: Windows | None
) -> PackPlan | None:
    """What to pack; None if --append finds nothing new. Locks the folder, and writes the settings."""
    pack = read_pack(args.pack) if args.append else None
    plan = plan_pack(args.source, args.pack, form, space, windows, reading_of(args), pack)
    lock_pack(args.pack, shared=args.part is not None)
    if plan:
        begin_pack(plan)
    return plan


def joined(plan: PackPlan, alone: bool) -> int:
    """Makes the pack whole, unless other parts of the work go on. Returns how many shards they have left."""
    left = 0 if alone else plan.settings.num_shards - len(read_shard_records(plan))
    if not left:
        finish(plan, alone)
    return left


def main() -> None:
    args = parse_args()
    device = distributed.start()
    distributed.check_same_flags(vars(args))
    vae = load_vae(args.vae, device) if args.vae != "none" else None
    form = Form(args.video, args.image_size or (DEFAULT_VAE_SIZE if vae else DEFAULT_SIZE))
    windows = windows_of(args, vae and vae.space)
    plan = distributed.on_main(lambda: planned(args, form, vae and vae.space, windows))
    part, parts = args.part or (1, 1)
    missing = distributed.on_main(lambda: missing_shards(plan, part, parts)) if plan else []

    mine = missing[distributed.rank() :: distributed.world_size()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.num_workers or max(1, cores // environment.local_ranks())
    count = sum(len(plan.shard(number)) for number in mine)
    hidden = not (mine and distributed.is_main())
    start = time.perf_counter()
    with tqdm(total=count, desc="packing", unit="clip" if form.video else "image", disable=hidden) as bar:
        pack_shards(plan, mine, workers, vae and vae.encode_moments, device.type == "cuda", bar)
    packed = sum(distributed.gather(count))
    left = distributed.on_main(lambda: joined(plan, args.part is None)) if plan else 0
    if distributed.is_main():
        report(args, left, packed, time.perf_counter() - start)
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, "lower --num-workers or --image-size")
