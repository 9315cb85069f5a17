"""The report of a comparison as plain data: distances, shares, and what the judge finds."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.features import Features
from evaluation.judge import Judged, learnable_classes, train_judge
from evaluation.metrics import METRICS, SUBSET_SIZE, Estimate, at_equal_counts, equal_count
from evaluation.sides import Side, SideFeatures
from precision import Precision
from runtime.errors import UserError


def compare_features(features: Features, real: Tensor, generated: Tensor, seed: int) -> dict:
    """Computes every metric of one kind of features, (N, D) and (M, D) float64, with its interval and its floor.

    What too few samples leave out is replaced by the reason.
    """
    called = {"Fréchet distance": f" ({features.frechet})", "kernel distance": f" ({features.kernel})"}
    smaller, halves, dimensions = min(len(real), len(generated)), equal_count(len(real), len(generated)), real.shape[1]
    metrics = []
    for metric in tqdm(METRICS, desc=f"comparing {features.name}", unit="metric"):
        about: dict = {"metric": metric.name + called.get(metric.name, ""), "of": features.title}
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
    about = {"features": features.name, "title": features.title, "precision": features.precision.label}
    about |= {"dimensions": dimensions, "equal_counts": halves}
    return about | {"kernel_subset_size": min(SUBSET_SIZE, smaller), "metrics": metrics}


def places_to_judge(real: Sequence[str], generated: Sequence[str]) -> list[int]:
    """Finds the generated samples that were asked to show a class of REAL, by the class of each sample.

    Raises:
        UserError: a judge cannot learn the classes of REAL, or no generated sample was asked for one of them.
    """
    learnable_classes(real)
    places = [i for i, name in enumerate(generated) if name in real]
    if not places:
        raise UserError("--judge: no sample of GENERATED was asked to show a class of REAL (in samples.csv)")
    return places


def check_judged(real: Side, generated: Side) -> None:
    """Raises UserError, before the long work, if `judge_samples` would."""
    places_to_judge(real.classes, generated.classes)


def judge_samples(
    real: SideFeatures, generated: SideFeatures, seed: int, device: torch.device, precision: Precision
) -> dict:
    """Trains a judge on real samples, and reports its accuracy on held-out ones and the share of right generated ones.

    Raises:
        UserError: as `places_to_judge`.
    """
    places = places_to_judge(real.classes, generated.classes)
    judge = train_judge(real.clips, real.classes, seed, device, precision)
    judged = judge.judge(generated.clips[places], [generated.classes[i] for i in places])
    return {
        "classes": judge.names,
        "precision": precision.label,
        "trained_on": judge.trained_on,
        "held_out": shares(judge.held_out, seed),
        "generated": shares(judged, seed),
        "without_class": len(generated.classes) - len(places),
    }


def shares(judged: Judged, seed: int) -> dict:
    """The share of samples that are right, by part, with its interval."""
    found: dict = {}
    for part, right in judged.right.items():
        values = torch.from_numpy(right).double()  # (N,)
        estimate = Estimate(float(values.mean()), values - values.mean(), torch.zeros(1).double())
        found[part] = {"samples": len(right), "share": estimate.value, "interval": estimate.interval(seed)}
    return found
