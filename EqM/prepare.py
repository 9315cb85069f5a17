"""Packs a data set: decodes every video or image once, into a folder that training reads at full speed.

    python EqM/prepare.py datasets/ucf-101/train datasets/ucf-101-pack --video --vae ema

Safe to interrupt: the same command goes on, and mends a pack that has been damaged.
"""

import argparse
import os
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from data.latents import IMAGE_SIZE, PIXEL_SIZE, VAE, load_vae
from data.packs.format import FORMAT, VERSION, Settings, read_settings, shard_path
from data.packs.pack import Pack, build_index, find_damage, read_index, read_shard_records
from data.packs.writer import Plan, disk_errors, name_in, pack_shards
from data.scan import check_readable, find_files
from runtime import cli, distributed
from runtime.errors import UserError
from runtime.files import leftovers, lock, write_json

PARTS = ("settings.json", "index.json", "shard-*.bin", "shard-*.json")


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Decodes a data set once, into a pack for EqM/train.py.")
    parser.add_argument("source", type=Path, help="class folders, or videos with a CSV")
    parser.add_argument("pack", type=Path, help="gets the pack: a new folder, or one to go on with or to mend")
    parser.add_argument("--video", action="store_true", help="pack videos, not images")
    parser.add_argument(
        "--image-size", type=cli.side, help=f"height and width, pixels; default {PIXEL_SIZE}, with a VAE {IMAGE_SIZE}"
    )
    parser.add_argument("--vae", default="none", metavar="{none,ema,mse,DIR}", help="pack latents of this VAE")
    parser.add_argument("--num-workers", type=cli.positive_int, help="processes a rank; default all cores")
    return parser.parse_args()


def vae_settings(args: argparse.Namespace, vae: VAE) -> dict:
    """What a pack keeps of its VAE.

    Raises:
        UserError: an image size that the VAE cannot halve so often.
    """
    space = vae.space
    return {
        "name": args.vae,
        "fingerprint": space.fingerprint,
        "scale": space.scale,
        "channels": space.channels,
        "side": space.side(args.image_size),
    }


def make_plan(args: argparse.Namespace, vae: VAE | None) -> Plan:
    """Finds the files, and opens the folder for them.

    Raises:
        UserError: no files, or a folder of other settings or of something else.
    """
    classes, samples = find_files(args.source, args.video)
    names = "\n".join(f"{name_in(args.source, path)}\t{label}" for path, label in samples)
    settings = Settings(
        format=FORMAT,
        version=VERSION,
        source=str(args.source.resolve()),
        video=args.video,
        image_size=args.image_size,
        values="latents" if vae else "pixels",
        vae=vae_settings(args, vae) if vae else {},
        classes=list(classes),
        files=len(samples),
        names_crc32=zlib.crc32(os.fsencode(names)),
    )
    with disk_errors(args.pack):
        args.pack.mkdir(parents=True, exist_ok=True)
        theirs = read_settings(args.pack)
        if not theirs:
            if set(args.pack.iterdir()) - set(leftovers(args.pack, "settings.json")):
                raise UserError(f"{args.pack} holds something else than a pack: give another folder")
            write_json(args.pack / "settings.json", asdict(settings))
    check_settings(args.pack, (theirs or settings).identity(), settings.identity())
    return Plan(args.pack, settings, args.source, samples)


def check_settings(folder: Path, theirs: dict, ours: dict) -> None:
    """Raises UserError, with both values, where a pack was made with other settings."""
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(f"{folder} was made with {key} {theirs[key]}, and this run has {value}: give a new folder")


def keep_others_out(folder: Path) -> None:
    """Locks a folder until this process and its workers end.

    Raises:
        UserError: another run has locked it.
    """
    with disk_errors(folder):
        alone = lock(folder)
    if not alone:
        raise UserError(f"another run is packing into {folder}: let it end, then run the same command again")


def missing_shards(plan: Plan) -> list[int]:
    """The shards that are not there yet, or are damaged. A whole pack is checked to the last byte."""
    whole = (plan.folder / "index.json").is_file()
    records = read_shard_records(plan.folder, plan.settings)
    damage = find_damage(plan.folder, records, show_progress=True, trust_times=not whole)
    for number, problem in sorted(damage.items()):
        tqdm.write(f"{shard_path(plan.folder, number)} {problem}: it is made anew")
    return sorted(damage.keys() | set(range(plan.settings.num_shards)) - records.keys())


def finish(plan: Plan) -> Pack:
    """Writes the index of a folder in which every shard is there, if it is not there already.

    Raises:
        UserError: too many files could not be read; a later run tries them again.
    """
    index = build_index(plan.folder, plan.settings)
    pack = Pack(plan.folder, plan.settings, index)
    try:
        check_readable(replace(pack.found(), root=plan.settings.source), plan.settings.video)
    except UserError:
        for number, record in read_shard_records(plan.folder, plan.settings).items():
            if record["unreadable"]:
                shard_path(plan.folder, number).with_suffix(".json").unlink()
        raise
    with disk_errors(plan.folder):
        # A whole pack is not touched: it may lie on a disk that can only be read.
        if read_index(plan.folder, plan.settings) != index:
            write_json(plan.folder / "index.json", index)
        for names in PARTS:
            for left in leftovers(plan.folder, names):
                left.unlink()
    return pack


def report(pack: Pack, packed: int, seconds: float) -> None:
    """Prints the last lines: what the pack holds, and how fast the items of this run were packed."""
    kind = "clips" if pack.settings.video else "images"
    for path, reason in pack.found().unreadable:
        print(f"skipped unreadable {path}: {reason}")
    print(
        f"{pack.folder} is whole: {len(pack):,} {kind} of {len(pack.settings.classes)} classes,"
        f" {pack.lengths.sum():,} frames, {pack.num_bytes():,} bytes, {len(pack.unreadable)} unreadable files skipped"
    )
    if packed:
        print(f"packed {packed:,} {kind} in {seconds:.1f} s: {packed / seconds:.1f} a second")


def main() -> None:
    args = parse_args()
    device = distributed.start()
    vae = load_vae(args.vae, device) if args.vae != "none" else None
    args.image_size = args.image_size or (IMAGE_SIZE if vae else PIXEL_SIZE)
    plan = distributed.on_main(lambda: make_plan(args, vae))
    distributed.on_main(lambda: keep_others_out(plan.folder))
    missing = distributed.on_main(lambda: missing_shards(plan))

    mine = missing[distributed.rank() :: distributed.world_size()]
    workers = args.num_workers or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    count = sum(len(plan.shard(number)) for number in mine)
    start = time.perf_counter()
    hidden = not (mine and distributed.is_main())
    with tqdm(total=count, desc="packing", unit="clip" if args.video else "image", disable=hidden) as bar:
        pack_shards(plan, mine, workers, vae and vae.encode_moments, device.type == "cuda", bar)
    packed = sum(distributed.gather(count))
    pack = distributed.on_main(lambda: finish(plan))
    if distributed.is_main():
        report(pack, packed, time.perf_counter() - start)
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, "lower --num-workers or --image-size")
