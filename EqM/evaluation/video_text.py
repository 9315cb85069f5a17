"""The report of EqM/evaluate_video.py as a table for people."""

from collections.abc import Iterator

FIRST, OTHERS = 32, 22  # characters of a column


def lines(report: dict) -> Iterator[str]:
    """Yields the lines of a whole report."""
    yield report["title"]
    judge = report["judge"]
    accuracy = ", ".join(f"{part} {share(found)}" for part, found in judge["held_out"].items())
    yield f"judge of {len(judge['classes'])} classes, right on held-out real clips: {accuracy}"
    yield ""
    rows = report["rows"]
    parts = next(iter(rows.values()))["shares"]
    measures = "PSNR" if "psnr" in next(iter(rows.values())) else ""
    yield row("right", *parts, measures)
    for name, found in rows.items():
        cells = [share(each) for each in found["shares"].values()]
        yield row(name, *cells, f"{found['psnr']:.2f} dB" if "psnr" in found else "")
    if "given_psnr" in report:
        yield f"the samples' given frames against those of their clips: {report['given_psnr']:.2f} dB"


def share(found: dict) -> str:
    """A share with its counts: 95.8% (46 of 48)."""
    count = found["samples"]
    return f"{found['share']:.1%} ({round(found['share'] * count)} of {count})"


def row(first: str, *cells: str) -> str:
    """A line of the table."""
    return (first.ljust(FIRST) + "".join(cell.ljust(OTHERS) for cell in cells)).rstrip()
