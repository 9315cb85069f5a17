"""Studies: the tables' words on known qualities, and one study as people run it, stopped and continued."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from conftest import run_python, run_script
from measuring.study_tables import Cell, loss_curves, quality_by_evaluations, tables

SMALL_STUDY = [
    *("--video", "--seeds", 1, "--samples", 6),
    *("--train-flags", "--max-steps 2 --image-size 16 --model EqM-Ti/4 --log-every 1 --num-workers 0"),
    *("--sample-flags", "--num-sampling-steps 2 --cfg-scale 1"),
]


def test_what_differs_by_more_than_the_spreads_is_bold():
    reference, far, missing = Cell((1.0, 1.2, 1.1)), Cell((1.5, 1.7, 1.6)), Cell((math.nan,) * 3)
    assert reference.text(reference) == "1.1 ± 0.1"
    assert Cell((1.2, 1.3, 1.1)).text(reference) == "1.2 ± 0.1"
    assert far.text(reference) == "**1.6 ± 0.1**"
    assert missing.text(reference) == "–"
    assert Cell((9.0,)).text(Cell((1.0,))) == "9", "of one seed no spread is known"


def cells(*variants: tuple[str, str]) -> dict:
    return {variant: {"quality": Cell((float(i), i + 1.0))} for i, variant in enumerate(variants)}


def test_each_quality_has_a_table_where_every_pair_was_tried():
    (table,) = tables(cells(("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")))
    assert table.splitlines() == [
        "quality:",
        "",
        "| trained in | sampled in fp32 | sampled in bf16 |",
        "| --- | --- | --- |",
        "| fp32 | 0.5 ± 0.71 | 1.5 ± 0.71 |",
        "| bf16 | **2.5 ± 0.71** | **3.5 ± 0.71** |",
    ]


@pytest.mark.parametrize("variants", [[("A", "gd"), ("B", "euler")], [("A", "50 steps"), ("A", "G = 0.1")]], ids=str)
def test_other_variants_have_one_table_for_all(variants):
    (table,) = tables(cells(*variants))
    assert table.splitlines()[0] == "| trained | sampled | quality |"
    assert table.splitlines()[3] == f"| {variants[1][0]} | {variants[1][1]} | 1.5 ± 0.71 |"


def test_curves_are_pictures_of_every_variant():
    metrics = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    assert loss_curves({"fp32": [metrics, metrics], "bf16": [metrics[:2]]}).dtype == np.uint8
    found = {("A", "9 steps"): {"evaluations": Cell((9.0,)), "quality": Cell((2.0,))}}
    found[("A", "G = 0.1")] = {"evaluations": Cell((5.0,)), "quality": Cell((3.0,))}
    assert quality_by_evaluations(found, "quality").shape[2] == 3


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_and_does_nothing_twice(shapes, tmp_path):
    def study(*flags: object) -> tuple[int, str, list[str]]:
        run = run_script(
            "study.py", "objective", shapes.parent, *SMALL_STUDY, "--output", "study", *flags, cwd=tmp_path
        )
        commands = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("python EqM/")]
        return run.returncode, run.stdout + run.stderr, commands

    status, printed, commands = study()
    assert status == 0, printed
    assert sorted(commands) == sorted(["EqM/train.py", "EqM/sample_gd.py", "EqM/evaluate.py"] * 2)
    rows = json.loads((tmp_path / "study" / "report.json").read_text())
    assert [(row["trained"], row["sampled"]) for row in rows] == [
        ("Equilibrium Matching", "descent"),
        ("flow matching", "Euler"),
    ]
    for row in rows:
        assert row["evaluations"] == [2]
        assert 0 <= row["both right"][0] <= 1
    assert "| Equilibrium Matching | descent |" in (tmp_path / "study" / "report.md").read_text()
    assert "computed: Equilibrium Matching in fp32, flow matching in fp32" in printed
    assert (tmp_path / "study" / "loss.png").exists()
    flow = json.loads(next(Path(tmp_path / "study" / "runs").glob("flow*/*/config.json")).read_text())
    assert flow["objective"]["schedule"] == "constant"
    assert flow["network"]["uncond"] is False

    next((tmp_path / "study" / "evaluations").glob("flow*.json")).unlink()
    status, printed, commands = study()
    assert status == 0, printed
    assert sorted(commands) == ["EqM/evaluate.py", "EqM/train.py", "EqM/train.py"], "train.py says that it has finished"
    status, printed, commands = study("--sample-flags", "--num-sampling-steps 3")
    assert (status, commands) == (1, [])
    assert "study.py: error: study holds a study with other flags" in printed


def test_a_folder_without_training_data_is_named(tmp_path):
    run = run_python("study.py", "adaptive", tmp_path, cwd=tmp_path)
    assert run.returncode == 1
    assert f"study.py: error: {tmp_path} has no folder train" in run.stderr
