"""Packs a data set: decodes every video or image once, into a folder that training reads at full speed.

    python EqM/prepare.py datasets/ucf-101/train datasets/ucf-101-pack --video --vae ema

Safe to interrupt: the same command goes on. It also mends a damaged pack.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import os
import time

from tqdm import tqdm

from data.form import Form
from data.latent_space import LatentSpace
from data.latents import DEFAULT_SIZE, DEFAULT_VAE_SIZE, load_vae
from data.packs.format import Windows
from data.packs.pack import Pack
from data.packs.packing import begin_pack, finish, lock_pack, missing_shards, plan_pack
from data.packs.workers import pack_shards
from runtime import cli, distributed, environment
from runtime.errors import UserError, shown


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Decodes a data set once, into a pack for EqM/train.py.")
    parser.add_argument("source", type=cli.path, help="class folders, or videos with a CSV")
    parser.add_argument("pack", type=cli.path, help="gets the pack: a new folder, or a pack to go on with or to mend")
    parser.add_argument("--video", action="store_true", help="pack videos, not images")
    parser.add_argument(
        "--image-size",
        type=cli.side,
        help=f"height and width, pixels; default {DEFAULT_SIZE}, with a VAE {DEFAULT_VAE_SIZE}",
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


def report(pack: Pack, packed: int, seconds: float) -> None:
    """Prints what the pack holds, and how fast this run packed its items."""
    kind = "clips" if pack.settings.video else "images"
    for path, reason in pack.found().unreadable:
        print(shown(f"skipped unreadable {path}: {reason}"))
    print(
        f"{pack.folder} is whole: {len(pack):,} {kind} of {len(pack.classes)} classes,"
        f" {pack.count_text()}, {pack.num_bytes():,} bytes, {len(pack.unreadable)} unreadable files skipped"
    )
    for line in pack.latent_report():
        print(line)
    if packed:
        print(f"packed {packed:,} {kind} in {seconds:.1f} s: {packed / seconds:.1f} a second")


def main() -> None:
    args = parse_args()
    device = distributed.start()
    distributed.check_same_flags(vars(args))
    vae = load_vae(args.vae, device) if args.vae != "none" else None
    form = Form(args.video, args.image_size or (DEFAULT_VAE_SIZE if vae else DEFAULT_SIZE))
    windows = windows_of(args, vae and vae.space)
    plan = distributed.on_main(lambda: plan_pack(args.source, args.pack, form, vae and vae.space, windows))
    distributed.on_main(lambda: lock_pack(plan.folder))
    distributed.on_main(lambda: begin_pack(plan))
    missing = distributed.on_main(lambda: missing_shards(plan))

    mine = missing[distributed.rank() :: distributed.world_size()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.num_workers or max(1, cores // environment.local_ranks())
    count = sum(len(plan.shard(number)) for number in mine)
    hidden = not (mine and distributed.is_main())
    start = time.perf_counter()
    with tqdm(total=count, desc="packing", unit="clip" if form.video else "image", disable=hidden) as bar:
        pack_shards(plan, mine, workers, vae and vae.encode_moments, device.type == "cuda", bar)
    packed = sum(distributed.gather(count))
    pack = distributed.on_main(lambda: finish(plan))
    if distributed.is_main():
        report(pack, packed, time.perf_counter() - start)
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, "lower --num-workers or --image-size")
