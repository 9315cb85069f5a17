"""Scores clips or images by the field and the energy of a network at them. Both are low for what is like its data.

    python EqM/score.py --ckpt results/000-EqM-S-4-Linear-velocity-None/checkpoints/0100000.pt videos other-videos

Only the first window of each clip counts. The field vanishes at the data (Wang & Du 2025, arXiv 2510.02300):

    norm    root mean square of f(x) over the elements of x
    energy  −E(x) over the number of elements. A network that was trained with an energy has its own. For others it
            is −⟨x, f(x)⟩, the `dot` energy of the same paper, read off the field.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.contents import Content, open_path
from data.latents import VAE, encode
from data.untrusted import Unreadable
from drawing.plots import Histogram, check_plots, write_plots
from models import EqM, sample_energy
from precision import add_precision_args, agree_on_precision, log_precision, requested_of
from runs.load_network import add_checkpoint_args, checkpoint_request_of, open_network
from runtime import cli, distributed
from runtime.distributed import batches_of_rank
from runtime.errors import UserError, shown
from runtime.files import check_writable, write_csv
from runtime.logs import log, start_log
from sampling.descent import norm_and_energy
from sampling.plan import class_index

SCORES = ("norm", "energy")


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Scores clips or images, and says how well the scores tell two paths apart.")
    parser.add_argument("paths", nargs="+", type=cli.path, metavar="PATH", help="one or two folders of files, or packs")
    parser.add_argument(
        "--output", type=cli.path, default=Path("scores.csv"), help="the table; with two paths, a plot lies beside it"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--class", dest="label", metavar="CLASS", help="score all files under this class; default: no class"
    )
    group.add_argument("--labels", action="store_true", help="score each file under the class of its class folder")
    parser.add_argument("--global-batch-size", type=cli.count, default=32, help="files at once, on all ranks")
    add_precision_args(parser)
    add_checkpoint_args(parser)
    args = parser.parse_args()
    if len(args.paths) > 2 or len({path.resolve() for path in args.paths}) < len(args.paths):
        raise UserError("give one PATH, or two different ones to tell apart")
    if len(args.paths) == 2:
        check_plots("comparing two paths")
    return args


def scores_at(network: EqM, x: Tensor, y: Tensor, seconds_per_frame: Tensor) -> Tensor:
    """Norm and energy (N, 2), float32, at inputs x (N, C, …) under labels y (N,); seconds_per_frame is (N,)."""

    def energy(y: Tensor, x: Tensor) -> Tensor:
        return sample_energy(network, x, y, seconds_per_frame)

    # γ is 1 at the data. Most networks do not see it.
    field = network(x, torch.ones_like(seconds_per_frame), y, seconds_per_frame)  # (N, C, …)
    return norm_and_energy(None if network.energy == "none" else energy)(y, x, field)


@torch.no_grad()
def score(
    content: Content, labels: list[int], network: EqM, vae: VAE | None, batch: int, name: str
) -> tuple[dict[int, list[float]], list[tuple[str, str]]]:
    """The scores (norm, energy) of this rank's files by place, and the files that cannot be read, with the reason.

    Args:
        labels: one for each file.
        batch: files at once, on all ranks.
        name: of the content, for the progress bar.

    Raises:
        UserError: a score is not finite.
    """
    device, rows, unreadable = network.device, {}, []

    def read(place: int) -> tuple[Tensor, float] | str:
        try:
            return content.read(place)
        except Unreadable as error:
            return str(error)

    batches = batches_of_rank(len(content.names), batch)
    hidden = not distributed.is_main()
    bar = tqdm(total=sum(map(len, batches)), desc=f"scoring {shown(name)}", unit="file", disable=hidden)
    with ThreadPoolExecutor() as pool, bar:
        for places in batches:
            results = dict(zip(places, pool.map(read, places), strict=True))
            unreadable += [(content.names[i], reason) for i, reason in results.items() if isinstance(reason, str)]
            read_ones = {i: result for i, result in results.items() if not isinstance(result, str)}
            if read_ones:
                x = torch.stack([x for x, _ in read_ones.values()]).to(device)
                x = encode(x, vae) if x.dtype == torch.uint8 else vae.space.normalised(x.float())  # (N, C, …)
                seconds = torch.tensor([seconds for _, seconds in read_ones.values()], device=device)  # (N,)
                seconds = seconds * (vae.space.time_factor if vae else 1)
                y = torch.tensor([labels[i] for i in read_ones], device=device)  # (N,)
                rows |= dict(zip(read_ones, scores_at(network, x, y, seconds).tolist(), strict=True))
            bar.update(len(places))
    bad = next((i for i, row in rows.items() if not np.isfinite(row).all()), None)
    if bad is not None:
        raise UserError(f"the field at {content.names[bad]} is not finite: score in fp32, or check the checkpoint")
    return rows, unreadable


def score_path(
    path: Path, content: Content, labels: list[int], network: EqM, vae: VAE | None, batch: int
) -> dict[str, list[float]]:
    """The scores (norm, energy) of the files of all ranks, by name. Logs their means, and what cannot be read.

    Every rank must call this.

    Raises:
        UserError: no file can be read, or a score is not finite.
    """
    parts = distributed.gather(score(content, labels, network, vae, batch, path.name))
    rows = {i: row for part, _ in parts for i, row in part.items()}
    unreadable = [problem for _, problems in parts for problem in problems]
    if unreadable:
        log.warning("%d files in %s cannot be read, for example %s: %s", len(unreadable), path, *unreadable[0])
    if not rows:
        raise UserError(f"no readable file in {path}: {unreadable[0][0]}: {unreadable[0][1]}")
    scores = {content.names[i]: rows[i] for i in sorted(rows)}
    means = np.mean(list(scores.values()), axis=0)
    log.info("%s: %d files, mean norm %.4g, mean energy %.4g", path, len(rows), *means)
    return scores


def own_labels(content: Content, names: list[str]) -> list[int]:
    """The label of each file, from the name of its class folder.

    Raises:
        UserError: the checkpoint does not know a folder's name.
    """
    unknown = [i for i, name in enumerate(content.classes) if name not in names]
    if unknown:
        raise UserError(
            f"--labels: {content.names[unknown[0]]} is in no class folder that the checkpoint knows: leave it out"
        )
    return [names.index(name) for name in content.classes]


def auroc(first: np.ndarray, second: np.ndarray) -> float:
    """How often a value of the second (M,) is above a value of the first (N,). A tie counts half.

    This is the area under the ROC curve: U of Mann & Whitney (1947), computed from ranks, over N·M.
    """
    _, place, counts = np.unique(np.concatenate([first, second]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # (N + M,); equal values share their mean rank
    u = ranks[len(first) :].sum() - len(second) * (len(second) + 1) / 2
    return float(u / (len(first) * len(second)))


def write_scores(path: Path, scores: dict[Path, dict[str, list[float]]]) -> None:
    """Writes a line for each file: the PATH that was given, the file below it, and its scores."""
    rows = [
        [root, name, *(f"{value:.7g}" for value in row)]
        for root, found in scores.items()
        for name, row in found.items()
    ]
    write_csv(path, [["path", "file", *SCORES], *rows])


def compare(scores: dict[Path, dict[str, list[float]]], picture: Path) -> None:
    """Logs how well each score tells two paths apart, and draws a histogram of each score.

    Args:
        scores: norm and energy of each file, by path and name of the file.
        picture: the PNG file to write.
    """
    (first, a), (second, b) = ((path, np.array(list(rows.values()))) for path, rows in scores.items())  # (N, 2)
    log.info("AUROC: how often a file of %s (%d) has a higher score than one of %s (%d)", second, len(b), first, len(a))
    short = [path.resolve().name for path in scores]
    names = short if len(set(short)) == 2 else [str(first), str(second)]
    plots = []
    for i, name in enumerate(SCORES):
        area = auroc(a[:, i], b[:, i])
        log.info("AUROC of the %s: %.4f", name, area)
        series = {names[0]: a[:, i].tolist(), names[1]: b[:, i].tolist()}
        plots.append(Histogram(series, f"{name} (AUROC {area:.3f})"))
    write_plots(picture, plots)
    log.info("histograms: %s", picture)


def check_output(path: Path, picture: bool) -> None:
    """Raises UserError if the table, or the picture beside it, could not be written."""
    if path.suffix == ".png" or path.is_dir():
        raise UserError(f"--output {path} names the table: give a file that ends in .csv")
    check_writable("--output", path)
    if picture:
        check_writable("beside --output,", path.with_suffix(".png"))


def main() -> None:
    # Flags
    args = parse_args()

    # Process
    device = distributed.start()
    start_log()
    precision = agree_on_precision(requested_of(args), device.type, tf32=args.tf32)
    precision.set_fp32_mode()

    # Network
    network, config, vae = open_network(checkpoint_request_of(args), device, precision)
    names = config.class_names

    # Files and the class that each is scored under
    contents = {path: open_path(path, config.form, config.space, "the checkpoint") for path in args.paths}
    label = len(names) if args.label is None else class_index(args.label, names)
    labels = {
        path: own_labels(content, names) if args.labels else [label] * len(content.names)
        for path, content in contents.items()
    }

    # Output
    distributed.on_main(partial(check_output, args.output, picture=len(args.paths) == 2))
    log_precision(precision)

    # Score
    scores = {
        path: score_path(path, content, labels[path], network, vae, args.global_batch_size)
        for path, content in contents.items()
    }

    # Report
    if distributed.is_main():
        write_scores(args.output, scores)
        log.info("scores: %s", args.output)
        if len(scores) == 2:
            compare(scores, args.output.with_suffix(".png"))
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, "lower --global-batch-size")
