"""Trains variants of one model with several seeds, samples and evaluates each, and tabulates their quality.

    python EqM/study.py precision datasets/moving-shapes --video    # fp32, bf16 and fp16, trained and sampled
    python EqM/study.py objective datasets/moving-shapes --video    # Equilibrium Matching and flow matching
    python EqM/study.py adaptive datasets/fashion-mnist             # quality against evaluations
    python EqM/study.py output datasets/moving-shapes --video       # S/4 with the field, S/8 with the clip
    python EqM/study.py optimizer datasets/moving-shapes --video    # AdamW and Muon, four rates each
    python EqM/study.py evaluations datasets/moving-shapes --video  # 16 planned steps and 250

DATA has a folder train/: networks are trained on it, and samples are compared with it. The study runs the commands
that people run, and prints each. Stop it when you like: the same command goes on where it was. On a CPU the
networks are smaller and the trainings shorter.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from drawing.plots import check_plots, write_plots
from measuring.study_tables import Cell, Cells, differences, loss_curves, quality_by_evaluations, tables
from measuring.trials import SETTINGS, STUDIES, Study, read_contents
from runs.record import read_metrics
from runtime import cli
from runtime.errors import UserError, shown
from runtime.files import check_writable, write_text
from runtime.logs import device_name

NOT_OF_SAMPLES = ("evaluations", "seconds", "ms a training step", "held-out clip error")


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Trains, samples and evaluates variants of one model, and tabulates their quality.")
    parser.add_argument("study", choices=STUDIES, help="what varies")
    parser.add_argument("data", type=cli.path, metavar="DATA", help="a folder with train/ of class folders")
    parser.add_argument("--video", action="store_true", help="the data are videos")
    parser.add_argument("--output", type=cli.path, help="gets everything; default results/study-STUDY-DATA")
    parser.add_argument("--seeds", type=cli.processes, default=3, help="trainings of each variant")
    parser.add_argument("--jobs", type=cli.processes, default=1, help="trainings at once; small ones idle a GPU")
    parser.add_argument("--train-flags", default="", metavar="FLAGS", help="more flags for train.py, as one text")
    parser.add_argument("--sample-flags", default="", metavar="FLAGS", help="more flags for sample_gd.py")
    parser.add_argument("--evaluate-flags", default="", metavar="FLAGS", help="more flags for evaluate.py")
    parser.add_argument("--samples", type=cli.count, help="of each variant and seed; default by data and device")
    args = parser.parse_args()
    if not (args.data / "train").is_dir():
        raise UserError(f"{args.data} has no folder train: name a data set that datasets/README.md makes")
    check_plots("a study")
    return args


def study_of(args: argparse.Namespace) -> Study:
    """The study that the flags describe, in the setting for this device."""
    setting = SETTINGS[args.video, torch.cuda.is_available()]
    return Study(
        name=args.study,
        data=args.data,
        video=args.video,
        output=args.output or Path("results") / f"study-{args.study}-{args.data.resolve().name}",
        seeds=args.seeds,
        samples=args.samples or setting.samples,
        setting=setting,
        train_flags=args.train_flags,
        sample_flags=args.sample_flags,
        evaluate_flags=args.evaluate_flags,
    )


def collect(study: Study) -> dict[tuple[str, str], dict[str, Cell]]:
    """The cell of each quality, by name, of each variant (training, sampling)."""
    cells = {}
    for training, samplings in study.variants.samplings.items():
        for sampling in samplings:
            seeds = [trial.qualities(sampling) for trial in study.trials() if trial.training == training]
            names = seeds[0]
            cells[training, sampling] = {n: Cell(tuple(found.get(n, math.nan) for found in seeds)) for n in names}
    return cells


def write_report(study: Study) -> None:
    """Writes and prints the tables, and draws the curves."""
    cells, setting = collect(study), study.setting
    where = f"{device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}, torch {torch.__version__}"
    head = f"{study.name}: {study.data}, {where}, {date.today()}; {study.seeds} seeds, {study.samples} samples of each"
    settings = f"train.py {setting.training} {study.train_flags}; sample_gd.py {setting.sampling} {study.sample_flags}"
    # Where the hardware lacks a precision, the run computed in fp32.
    precisions = {trial.training: trial.precision() for trial in study.trials()}
    computed = ", ".join(f"{name} in {precision}" for name, precision in precisions.items())
    text = "\n".join([head, "", settings, "", f"computed: {computed}", "", *tables(cells), *differences(cells)])
    write_text(study.output / "report.md", text)
    rows = [{"trained": t, "sampled": s} | {n: c.known() for n, c in row.items()} for (t, s), row in cells.items()]
    write_text(study.output / "report.json", json.dumps(rows, indent=1) + "\n")
    draw_curves(study, cells)
    print(f"\n{text}\nreport.md, report.json and pictures are in {shown(study.output)}")


def draw_curves(study: Study, cells: Cells) -> None:
    """Draws the losses, held-out clip errors if there are some, and for adaptive sampling quality by evaluations."""
    held_out, runs = "held_out_clip_error", {name: [] for name in study.variants.trainings}
    for trial in study.trials():
        runs[trial.training].append(read_metrics(trial.run_folder, ("step", "loss"), (held_out,)))
    write_plots(study.output / "loss.png", [loss_curves(runs)])
    measured = {name: [[row for row in rows if held_out in row] for rows in seeds] for name, seeds in runs.items()}
    if any(rows for seeds in measured.values() for rows in seeds):
        write_plots(study.output / "clip-error.png", [loss_curves(measured, held_out, "held-out clip error")])
    if study.name == "adaptive":
        for name in (name for name in next(iter(cells.values())) if name not in NOT_OF_SAMPLES):
            path = study.output / f"{name}-by-evaluations.png".replace(" ", "-")
            write_plots(path, [quality_by_evaluations(cells, name)])


def check_settings(study: Study) -> None:
    """Writes into the folder of the study how it is made. More seeds can be added later; all else stays the same.

    Raises:
        UserError: the folder holds a study that was made otherwise.
    """
    ours = {"study": study.name} | {
        name: str(getattr(study, name)) for name in ("data", "video", "train_flags", "sample_flags", "evaluate_flags")
    }
    ours |= asdict(study.setting) | {"samples": study.samples}
    path = study.output / "settings.json"
    if path.exists() and read_contents(path) != ours:
        raise UserError(f"{study.output} holds a study with other flags, data or device: name another --output")
    check_writable("--output", path)
    write_text(path, json.dumps(ours, indent=1) + "\n")


def main() -> None:
    args = parse_args()
    study = study_of(args)
    check_settings(study)
    trials = study.trials()
    commands = sum(1 + 2 * len(study.variants.samplings[trial.training]) for trial in trials)
    with tqdm(total=commands, unit="command") as bar, ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(trial.run, bar.update) for trial in trials]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_report(study)


if __name__ == "__main__":
    cli.run(main, "read what the failed command printed, in the folder logs")
