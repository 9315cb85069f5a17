"""Exports the averaged weights of a checkpoint into a folder that others can load: safetensors, config and card.

    python EqM/export.py results/000-EqM-S-4-Linear-velocity-None/checkpoints/0100000.pt my-network

EqM/sample_gd.py --ckpt my-network samples from it. Nothing in the folder is pickled. docs/weights.md says more.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from evaluation.report_text import comparison_lines, judge_lines
from network_settings import check_weights
from runs.checkpoint import check_written_here, load_file, network_weights
from runs.config import Config, config_of
from runs.exchange import (
    CARD,
    CONFIG,
    PICTURE,
    WEIGHTS,
    check_replaceable,
    exchanged_config,
    write_folder,
    write_weights,
)
from runs.record import numbers_of, read_lines
from runtime import cli
from runtime.errors import UserError, shown
from runtime.files import open_regular, parse_json
from runtime.plain_data import brief, brief_names
from runtime.size import spelt

SHEET = "-sheet.png"  # the end of the names of a run's previews, after the step


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Exports the averaged weights of a checkpoint into a folder that others can load.")
    parser.add_argument("ckpt", type=cli.path, metavar="CKPT", help="a checkpoint that EqM/train.py wrote")
    parser.add_argument(
        "folder", type=cli.path, metavar="FOLDER", help="gets the network: a new folder, or one of an earlier export"
    )
    parser.add_argument("--evaluation", type=cli.path, metavar="FILE", help="a report of EqM/evaluate.py for the card")
    return parser.parse_args()


def score_lines(path: Path) -> list[str]:
    """The scores of a report of EqM/evaluate.py, as a block of the card. Raises UserError if the file is none."""
    try:
        report = parse_json(path)
        lines = [f"{report['generated']['samples']} samples, {report['real']['samples']} real ones"]
        for comparison in report["comparisons"]:
            lines += ["", *comparison_lines(comparison)]
        lines += ["", *judge_lines(report["judge"])] if "judge" in report else []
    except OSError as error:
        raise UserError(f"--evaluation {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration, RuntimeError):
        raise UserError(f"--evaluation {path} is damaged, or is no report of EqM/evaluate.py") from None
    return ["", "## Scores", "", "```", *map(shown, lines), "```"]


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in; None: it was taken out of it."""
    folder = Path(os.path.realpath(checkpoint)).parent
    return folder.parent if folder.name == "checkpoints" else None


def newest_sheet(run: Path | None, step: int) -> tuple[int, Path] | None:
    """The step and the file of a run's newest contact sheet up to a step; None: there is none."""
    found = [(path.name.removesuffix(SHEET), path) for path in run.glob(f"samples/*{SHEET}")] if run else []
    sheets = [(int(number), path) for number, path in found if number.isdecimal() and path.is_file()]
    return max((sheet for sheet in sheets if sheet[0] <= step), default=None)


def losses(run: Path | None, step: int) -> Iterator[tuple[str, str]]:
    """Rows of the card from the last line of a run's metrics up to a step: the loss, and what was held out."""
    path = run / "metrics.jsonl" if run else None
    for line in reversed(read_lines(path) if path and path.is_file() else []):
        row = numbers_of(line, ["step"])
        if row and row["step"] <= step:
            for name, value in json.loads(line).items():
                if (name == "loss" or "held_out" in name) and isinstance(value, float):
                    yield name.replace("_", " "), f"{value:.4g} at step {row['step']:,.0f}"
            return


def clips_of(config: Config) -> str:
    """The form of the clips that a network was trained on, in words."""
    form, mixed = config.form, {name: value for name, value in config.flags.items() if isinstance(value, tuple)}
    lengths, intervals = mixed.get("clip_len", (form.clip_len,)), mixed.get("frame_interval", (form.frame_interval,))
    rates = [config.frames_per_second * form.frame_interval / interval for interval in intervals]
    every = f"one frame in {either(intervals)}, {either(f'{rate:.3g}' for rate in rates)} a second"
    return f"clips of {either(lengths)} frames of {spelt(form.image_size)} pixels, {every}"


def either(values: Iterable[object]) -> str:
    """Values, such as 4, 8 or 16, in words."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def about(config: Config, steps: int, samples: int, weights: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Rows of the card: what the config says, for people."""
    network, form, objective, space = config.network, config.form, config.objective, config.space
    parameters = sum(tensor.numel() for name, tensor in weights.items() if name != "pos_embed")
    yield "network", f"{network.model}, {parameters:,} parameters, energy: {network.energy}"
    yield "samples", clips_of(config) if form.video else f"images of {spelt(form.image_size)} pixels"
    yield "seen as", f"latents of the VAE {brief(Path(space.name).name)}" if space else "pixels in [−1, 1]"
    source = Path(str(config.flags.get("data_path") or "not known")).name
    files = f", {sum(config.class_counts):,} files" if config.class_counts else ""
    yield "data", f"{brief(source)}{files}, {len(config.classes)} classes: {brief_names(list(config.classes))}"
    seen = "hidden" if network.uncond else "seen: sample with `--sampler euler`"
    yield "objective", f"path {objective.path}, c(γ) {objective.schedule} with λ = {objective.scale:g}; γ is {seen}"
    yield "training", f"{steps:,} steps, {samples:,} samples, {brief(config.precision['name'])[1:-1]}"


def card(folder: str, rows: list[tuple[str, str]], sheet: int | None, scores: list[str]) -> str:
    """The card of a network in Markdown.

    Args:
        folder: its name.
        sheet: the step of the picture; None: there is none.
    """
    lines = ["---", "tags:", "- equilibrium-matching", "---", f"# {shown(folder)}", ""]
    lines += ["A network of [Equilibrium Matching](https://arxiv.org/abs/2510.02300), with averaged weights.", ""]
    if sheet is not None:
        lines += [f"![Samples of step {sheet}]({PICTURE})", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {text.replace('|', '/')} |" for name, text in rows), *scores]
    lines += ["", "## Use", "", "With the program EqM, and this folder or its id on the Hugging Face hub:", "", "```"]
    lines += [f"python EqM/sample_gd.py --ckpt {shown(folder)} --folder samples", "```", ""]
    lines += ["`model.safetensors` holds float32 weights, and `config.json` all settings. Nothing is pickled.", ""]
    return "\n".join(lines)


def export(checkpoint: Path, folder: Path, evaluation: Path | None) -> None:
    """Writes the folder. Raises UserError if the checkpoint or the report cannot be read, or the folder not written."""
    check_replaceable(folder)
    scores = score_lines(evaluation) if evaluation else []
    contents = load_file(checkpoint)
    check_written_here(contents, checkpoint)
    config = config_of(contents["config"], checkpoint)
    weights = network_weights({"ema": contents["ema"]}, checkpoint)
    check_weights(config.network.check(checkpoint), weights, checkpoint)
    step, samples, run = contents["step"], contents["samples"], run_of(checkpoint)
    if not all(isinstance(count, int) for count in (step, samples)):
        raise UserError(f"{checkpoint} is damaged: step or samples is no whole number")
    sheet = newest_sheet(run, step)
    rows = [*about(config, step, samples, weights), *losses(run, step)]

    def write(temporary: Path) -> None:
        write_weights(temporary / WEIGHTS, weights)
        text = json.dumps(exchanged_config(config), indent=2)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        if sheet:
            with open_regular(sheet[1]) as file:
                (temporary / PICTURE).write_bytes(file.read())
        text = card(folder.name, rows, sheet and sheet[0], scores)
        (temporary / CARD).write_bytes(text.encode(errors="backslashreplace"))

    write_folder(folder, write)


def main() -> None:
    args = parse_args()
    folder = Path(os.path.realpath(args.folder))
    export(args.ckpt, folder, args.evaluation)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(shown(f"{folder}: {size:,} bytes; sample from it with EqM/sample_gd.py --ckpt {args.folder}"))


if __name__ == "__main__":
    cli.run(main, "use a machine with more memory")
