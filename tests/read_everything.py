"""Scans a folder of videos and reads every file once as training does, in two workers; prints what happened as JSON.

`scanned` are the paths that the scan skipped; `met` those that reading skipped, by the path that was
asked for; `alone` those of the class named that do not read one by one; `counted` how many the log
of a run would count; `memory_gb` the largest process's peak.

    python tests/read_everything.py FOLDER CLASS
"""

import json
import resource
import sys
from pathlib import Path

from data.batches import EpochStream, UnreadableLog, make_loader
from data.clips import Samples, read_sample
from data.form import Form
from data.scan import scan_for_training
from data.untrusted import Unreadable
from runs.record import process_memory_gb
from runtime.random_numbers import keyed_uniforms

BATCH = 50


def does_not_read(samples: Samples, key: tuple[int, int]) -> bool:
    try:
        read_sample(samples.found[key[1]], samples.form, keyed_uniforms(0, [key])[0][0])
    except Unreadable:
        return True
    return False


def main() -> None:
    found = scan_for_training(Path(sys.argv[1]), video=True, show_progress=False)
    samples = Samples(found, Form(True, image_size=16, clip_len=4, frame_interval=2), seed=0)
    stream = EpochStream(len(found), BATCH, -(-len(found) // BATCH), seed=0, first=0, rank=0, ranks=1)
    keys = [key for batch in stream for key in batch]
    log, met, reports = UnreadableLog(found), {}, []
    for batch in make_loader(samples, stream, num_workers=2, pin_memory=False):
        log.add(batch["unreadable"])
        log.exchange()
        reports += batch["unreadable"]
    for (epoch, index), report in zip(keys, reports, strict=True):
        if report and not epoch:
            met[found[index].path] = [path for path, _ in report]
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    suspects = [(0, i) for i, item in enumerate(found) if found.classes[item.label] == sys.argv[2]]
    alone = [found[key[1]].path for key in suspects if does_not_read(samples, key)]
    scanned = [path for path, _ in found.unreadable]
    result = {"files": len(found) + len(scanned), "scanned": scanned, "met": met, "counted": len(log.known)}
    print(json.dumps(result | {"alone": alone, "memory_gb": max(process_memory_gb(), workers)}))


if __name__ == "__main__":
    main()
