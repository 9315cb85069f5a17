"""Reads every file of a folder as scan, pack, training and evaluation do; prints what happened as JSON.

`errors` are those that are not Unreadable, by file; `unreadable` counts the others; `slowest_s` is the processor time
of the slowest file; `memory_gb` the peak of this process above its start.

    python tests/read_damaged.py FOLDER
"""

import json
import resource
import sys
import time
from pathlib import Path

from data.clips import read_image
from data.images import image_size, probe_image
from data.untrusted import Unreadable
from data.video import iterate_frames, probe_video, read_frames, video_size

SIDE = 16


def read_as_image(path: str) -> None:
    probe_image(path)
    image_size(path)
    read_image(path, SIDE)


def read_as_video(path: str) -> None:
    info = probe_video(path)
    video_size(path)
    last = len(info.times) - 1
    for places in ([0, last], [last // 2, last // 2 + 1 if last else 0]):
        try:
            read_frames(path, info, places, SIDE)
        except Unreadable:  # of another place than the next one
            continue
    for _ in iterate_frames(path, info, SIDE):
        pass


def main() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    errors, unreadable, slowest = {}, 0, 0.0
    for path in sorted(Path(sys.argv[1]).iterdir()):
        start = time.process_time()
        try:
            (read_as_image if path.suffix == ".image" else read_as_video)(str(path))
        except Unreadable as error:
            unreadable += 1
            if not str(error).strip() or "\n" in str(error):
                errors[path.name] = f"reason {str(error)!r}"
        except Exception as error:
            errors[path.name] = repr(error)
        slowest = max(slowest, time.process_time() - start)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 / 1e9
    print(json.dumps({"errors": errors, "unreadable": unreadable, "slowest_s": slowest, "memory_gb": memory}))


if __name__ == "__main__":
    main()
