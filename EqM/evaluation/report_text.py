"""The report of EqM/evaluate.py as tables for people."""

from collections.abc import Iterator

from runtime.size import read_size, spelt

COLUMNS = (33, 36, 36, 0)  # characters


def lines(report: dict) -> Iterator[str]:
    """Yields the lines of a whole report of EqM/evaluate.py."""
    compared = report["compared"]
    frames = f"{compared['frames']} frames of " if compared["video"] else ""
    yield f"compared as {frames}{spelt(read_size(compared['side']))} pixels"
    for name, key in (("REAL", "real"), ("GENERATED", "generated")):
        side = report[key]
        every = f", one frame in {side['frame_interval']}" if side["frame_interval"] > 1 and compared["video"] else ""
        yield f"{name}: {side['samples']} samples of {side['path']}{every}"
    for comparison in report["comparisons"]:
        yield ""
        yield from comparison_lines(comparison)
    if "judge" in report:
        yield ""
        yield from judge_lines(report["judge"])
    if "neighbours" in report:
        yield ""
        yield from neighbour_lines(report["neighbours"])


def comparison_lines(comparison: dict) -> Iterator[str]:
    """Yields a heading, one line per metric, and the reasons for what is left out."""
    metrics, counts = comparison["metrics"], comparison["equal_counts"]
    yield f"{comparison['title']}: {comparison['dimensions']} numbers a sample, in {comparison['precision']}"
    yield row("", "all samples [95%]", f"{counts} generated, {counts} real", f"{counts} real, {counts} real: the floor")
    reasons = []
    for metric in metrics:
        halves = metric.get("at_equal_counts")
        value = "left out" if "left_out" in metric else f"{metric['value']:.4g} {interval(metric['interval'])}"
        equal = [spread(halves["generated"]), spread(halves["floor"])] if halves else ["left out"] * 2
        yield row(metric["metric"], value, *equal)
        for key, what in (("left_out", ""), ("floor_left_out", "the floor of the ")):
            if key in metric:
                reasons.append(f"{what}{metric['metric']} is left out: {metric[key]}")
    yield from reasons


def judge_lines(judge: dict) -> Iterator[str]:
    """Yields the share that shows the class asked for, by part, beside the judge's own accuracy."""
    about = f"trained on {judge['trained_on']} real samples, in {judge['precision']}"
    yield f"judge of {len(judge['classes'])} classes, {about}"
    held_out, generated = (next(iter(judge[key].values()))["samples"] for key in ("held_out", "generated"))
    yield row("right [95%]", f"{generated} generated", f"{held_out} held-out real: its accuracy")
    for part, found in judge["generated"].items():
        shown = [f"{each['share']:.1%} {percentages(each['interval'])}" for each in (found, judge["held_out"][part])]
        yield row(part, *shown)
    if judge["without_class"]:
        yield f"not judged: {judge['without_class']} generated samples, which were asked for no class of REAL"


def neighbour_lines(neighbours: dict) -> Iterator[str]:
    """Yields how far samples are from the nearest sample of REAL, beside held-out real ones."""
    yield f"distance to the nearest sample of REAL: {neighbours['of']}"
    yield row("", "median (least to largest)", "samples")
    for key, name in (("generated", "generated"), ("held_out", "held-out real")):
        if key in neighbours:
            found = neighbours[key]
            distances = f"{found['median']:.3f} ({found['least']:.3f} to {found['largest']:.3f})"
            yield row(name, distances, str(found["samples"]))
    if "held_out" in neighbours:
        yield f"nearer than every held-out real one: {neighbours['nearer_than_held_out']} generated samples"


def row(*cells: str) -> str:
    """Joins cells to a line, each as wide as its column."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, COLUMNS, strict=False)).rstrip()


def interval(ends: tuple[float, float]) -> str:
    """An interval with four digits."""
    return f"[{ends[0]:.4g}, {ends[1]:.4g}]"


def percentages(ends: tuple[float, float]) -> str:
    """An interval of shares."""
    return f"[{ends[0]:.1%}, {ends[1]:.1%}]"


def spread(values: list[float]) -> str:
    """The mean, with the least and the largest value."""
    return f"{sum(values) / len(values):.4g} ({min(values):.4g} to {max(values):.4g})"
