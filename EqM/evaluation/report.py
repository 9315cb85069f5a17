"""The report of a comparison: distances, shares, and what the judge says."""

from dataclasses import asdict

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.features import Features
from evaluation.judge import Judged, check_classes, train_judge
from evaluation.metrics import METRICS, SUBSET_SIZE, Estimate, at_equal_counts, equal_count
from evaluation.sides import Side
from runtime.errors import UserError


def compare(each: Features, real: Tensor, generated: Tensor, seed: int) -> dict:
    """Every metric of one kind of features (N, D), (M, D), as plain data, with its floor or why there is none."""
    called = {"Fréchet distance": f" ({each.frechet})", "kernel distance": f" ({each.kernel})"}
    smaller, halves, dimensions = min(len(real), len(generated)), equal_count(len(real), len(generated)), real.shape[1]
    metrics = []
    for metric in tqdm(METRICS, desc=f"comparing {each.name}", unit="metric"):
        about: dict = {"metric": metric.name + called.get(metric.name, ""), "of": each.title}
        if reason := metric.too_few(smaller, dimensions):
            about["left_out"] = reason
        else:
            estimate = metric.estimate(real, generated)
            about |= {"value": estimate.value, "interval": estimate.interval(seed)}
        if reason := metric.too_few(halves, dimensions):
            about["floor_left_out"] = reason
        else:
            about["at_equal_counts"] = asdict(at_equal_counts(metric, real, generated, seed))
        metrics.append(about)
    about = {"features": each.name, "title": each.title, "dimensions": dimensions, "equal_counts": halves}
    return about | {"kernel_subset_size": min(SUBSET_SIZE, smaller), "metrics": metrics}


def check_judged(real: Side, generated: Side) -> list[int]:
    """The places of the generated samples that were asked to show a class of REAL.

    Raises:
        UserError: REAL has no classes to learn, or no sample is of one of them.
    """
    check_classes(real.classes)
    known = [i for i, name in enumerate(generated.classes) if name in real.classes]
    if not known:
        raise UserError(f"--judge: no sample of {generated.path} was asked to show a class of REAL (samples.csv)")
    return known


def judge_samples(real: Side, generated: Side, seed: int, device: torch.device) -> dict:
    """How a judge fares on held-out real samples, and how many generated ones show the class asked for.

    Raises:
        UserError: as `check_judged`.
    """
    known = check_judged(real, generated)
    judge = train_judge(real.clips, real.classes, seed, device)
    with torch.no_grad():
        judged = judge.judge(generated.clips[known], [generated.classes[i] for i in known])
    return {
        "classes": judge.names,
        "trained_on": judge.trained_on,
        "held_out": shares(judge.held_out, seed),
        "generated": shares(judged, seed),
        "without_class": len(generated.classes) - len(known),
    }


def shares(judged: Judged, seed: int) -> dict:
    """The share of samples that are right, by part, with its interval."""
    found: dict = {}
    for part, right in judged.right.items():
        values = torch.from_numpy(right).double()
        estimate = Estimate(float(values.mean()), values - values.mean(), torch.zeros(1).double())
        found[part] = {"samples": len(right), "share": estimate.value, "interval": estimate.interval(seed)}
    return found
