"""Prints what training would find in a folder or a pack.

    python EqM/check_data.py datasets/ucf-101/train --video --decode

Without --decode it opens each file once, and keeps what it found in the index of the folder. Training then starts from
the index, and opens only what has changed.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


from collections import Counter
from collections.abc import Iterator

import numpy as np

from data.file_list import Found
from data.packs.pack import is_pack, open_pack
from data.scan import check_readable, scan
from runtime import cli
from runtime.errors import UserError, shown


def summary(found: Found, video: bool, unit: str = "frames") -> Iterator[str]:
    """Lines that tell a person what there is. The unit is what a clip has many of."""
    kind = "clips" if video else "images"
    yield f"{found.root}: {len(found)} {kind} of {len(found.classes)} classes"
    for name, count in zip(found.classes, found.count_by_class(), strict=True):
        yield f"  {shown(name)}: {count}"
    if video and len(found):
        rates = Counter(found.videos.rates.round(2).tolist())
        yield "frames a second: " + ", ".join(f"{rate:g} ({n} clips)" for rate, n in sorted(rates.items()))
        lengths = found.videos.lengths
        yield f"{unit} a clip: {lengths.min()} to {lengths.max()}, median {np.median(lengths):g}"
    yield from found.notes
    yield f"unreadable files: {len(found.unreadable)}"
    for path, reason in found.unreadable:
        yield f"  {shown(path)}: {shown(reason)}"


def main() -> None:
    parser = cli.ArgumentParser("Prints what training would find in a folder or a pack.")
    parser.add_argument("path", type=cli.path, help="class folders, videos with a CSV, or a pack")
    parser.add_argument("--video", action="store_true", help="look for videos, not images; a pack knows what it holds")
    decode = (
        "decode each file to its end: slow, finds more damage; fails if over a tenth (and over one file) is damaged"
    )
    parser.add_argument("--decode", action="store_true", help=decode)
    args = parser.parse_args()

    if is_pack(args.path):
        if args.decode:
            raise UserError(f"{args.path} is a pack, which holds decoded frames: --decode is for folders of files")
        pack = open_pack(args.path)
        print("\n".join([pack.describe(), *pack.latent_report()]))
        found, video, unit = pack.found(), pack.settings.video, pack.settings.unit
    else:
        found, video, unit = scan(args.path, args.video, decode=args.decode), args.video, "frames"
    for line in summary(found, video, unit):
        print(line)
    if args.decode:
        check_readable(len(found), found.unreadable, found.root, video)


if __name__ == "__main__":
    cli.run(main, out_of_memory_advice="look at a smaller folder", only_prints=True)
