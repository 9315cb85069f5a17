"""Studies: the tables' words on known qualities, and one study as people run it, stopped and continued."""

import json
import math
import os
from pathlib import Path

import pytest

from conftest import run_python, run_script
from measuring.study_tables import Cell, differences, loss_curves, quality_by_evaluations, tables
from measuring.trials import Setting, Study, training_qualities
from runtime.errors import UserError
from study import check_settings

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


def test_differences_are_taken_seed_by_seed_and_bold_beyond_two_standard_errors():
    reference, higher, other = Cell((1.0, 5.0, 9.0)), Cell((1.1, 5.2, 9.3)), Cell((1.2, 4.8, 9.1))
    # 0.1, 0.2 and 0.3 have the standard deviation 0.1, and their mean the standard error 0.1 / √3.
    assert higher.difference(reference) == "**+0.2 ± 0.058**"
    assert other.difference(reference) == "+0.0333 ± 0.12"
    assert Cell((math.nan,) * 3).difference(reference) == "–"
    found = {("A", "x"): {"quality": reference}, ("A", "y"): {"quality": higher}}
    (table,) = differences(found)
    assert table.splitlines()[2:] == [
        "| trained | sampled | quality |",
        "| --- | --- | --- |",
        "| A | y | **+0.2 ± 0.058** |",
    ]
    assert list(differences({("A", "x"): {"quality": Cell((1.0,))}, ("A", "y"): {"quality": Cell((1.0,))}})) == []


def test_the_time_of_a_step_leaves_out_compiling_and_evaluations(tmp_path):
    rows = [(1, 60.0), (100, 70.0), (200, 75.0), (300, 80.0)]
    lines = [{"step": step, "training_seconds": seconds, "minutes": 99} for step, seconds in rows]
    lines[2]["held_out_clip_error"], lines[3]["held_out_clip_error"] = 0.5, 0.25
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_qualities(tmp_path) == {"ms a training step": 50, "held-out clip error": 0.25}
    path.write_text(json.dumps({"step": 1}) + "\n")
    found = training_qualities(tmp_path)
    assert math.isnan(found.pop("ms a training step"))
    assert found == {}


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


def test_a_loss_curve_is_the_mean_over_the_runs_of_a_variant():
    short, long = (
        [{"step": step, "loss": loss / step} for step in steps] for loss, steps in ((1, (1, 2)), (3, (1, 2, 3)))
    )
    curves = loss_curves({"fp32": [long, short], "bf16": [short]})
    assert curves.series == {"fp32": [(1, 2.0), (2, 1.0), (3, 1.0)], "bf16": [(1, 1.0), (2, 0.5)]}
    assert curves.log_y


def test_qualities_are_drawn_by_evaluations_fixed_and_adaptive_apart():
    found = {
        ("A", sampling): {"evaluations": Cell(evaluations), "Fréchet distance": Cell((quality,))}
        for sampling, evaluations, quality in (
            ("9 steps", (9.0,), 2.0),
            ("5 steps", (5.0,), 3.0),
            ("G = 0.1", (4.0, 6.0), 2.5),
        )
    }
    curves = quality_by_evaluations(found, "Fréchet distance")
    assert curves.series == {"fixed steps": [(5, 3.0), (9, 2.0)], "adaptive": [(5, 2.5)]}
    assert curves.y_label == "Fréchet distance"


def small_study(output: Path, **changed: object) -> Study:
    settings = {"name": "precision", "data": Path("data"), "video": True, "seeds": 2, "samples": 6}
    flags = dict.fromkeys(("train_flags", "sample_flags", "evaluate_flags"), "")
    return Study(**{"output": output, "setting": Setting("--lr 1", "--mu 0", 480)} | settings | flags | changed)


@pytest.mark.parametrize(
    "changed",
    [{"samples": 7}, {"name": "objective"}, {"data": Path("other")}, {"video": False}, {"train_flags": "--lr 2"}],
    ids=str,
)
def test_a_study_goes_on_with_more_seeds_but_with_nothing_else_changed(tmp_path, changed):
    check_settings(small_study(tmp_path))
    check_settings(small_study(tmp_path, seeds=3))
    with pytest.raises(UserError, match="holds a study with other flags, data or device"):
        check_settings(small_study(tmp_path, **changed))


BROKEN = ["", '{"study": ', "[" * 200_000, "1" * 5000, '{"study": "\ud800"}', "\0" * 99]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_damaged_settings_of_a_study_are_one_line(tmp_path, text):
    study = small_study(tmp_path)
    check_settings(study)
    (tmp_path / "settings.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(
        UserError, match=r"^.*settings\.json is damaged \([^\n]+\): remove it, then repeat this command$"
    ):
        check_settings(study)


REPORT = {
    "comparisons": [{"features": "pixels", "metrics": [{"metric": "FD", "value": 3.5}, {"metric": "KD"}]}],
    "judge": {"generated": {"class": {"share": 0.5}}},
}
BROKEN_REPORTS = [*BROKEN, "null", "[]", "{}", '{"comparisons": 3}', '{"comparisons": [], "judge": {"generated": 3}}']
BROKEN_REPORTS += [json.dumps(REPORT).replace("3.5", value) for value in ("1e999", '"3"', "null", "1" * 400)]


def test_a_damaged_report_is_made_again_with_a_word(tmp_path, capsys):
    trial = small_study(tmp_path).trials()[0]
    path = trial.evaluation("fp32")
    path.parent.mkdir()
    assert trial.report("fp32") == {}
    assert capsys.readouterr().out == ""
    for text in BROKEN_REPORTS:
        path.write_bytes(text.encode(errors="surrogatepass"))
        assert trial.report("fp32") == {}
        assert capsys.readouterr().out == f"{path} is damaged: it is made again\n"
    path.write_text(json.dumps(REPORT))
    found = trial.report("fp32")
    assert (found["FD, pixels"], found["class right"]) == (3.5, 0.5)
    assert math.isnan(found["KD, pixels"])


@pytest.mark.parametrize(
    "table", [None, b"", b"evaluations\n", b"evaluations\nx\n", b"file\na.mp4\n", b"evaluations\n\xff\0"]
)
def test_a_damaged_table_of_samples_says_what_to_remove(tmp_path, table):
    trial = small_study(tmp_path).trials()[0]
    trial.samples("fp32").mkdir(parents=True)
    if table is not None:
        (trial.samples("fp32") / "samples.csv").write_bytes(table)
    with pytest.raises(UserError, match=r"samples\.csv is damaged: remove .* and .*, then repeat this command$"):
        trial.qualities("fp32")


@pytest.mark.timeout(30)
def test_a_pipe_in_the_place_of_a_file_of_a_study_is_not_waited_for(tmp_path):
    trial = small_study(tmp_path).trials()[0]
    for path in (tmp_path / "settings.json", trial.evaluation("fp32"), trial.samples("fp32") / "samples.csv"):
        path.parent.mkdir(exist_ok=True, parents=True)
        os.mkfifo(path)
    with pytest.raises(UserError, match="settings.json is damaged .*it is a folder, a pipe or a device"):
        check_settings(trial.study)
    assert trial.report("fp32") == {}
    with pytest.raises(UserError, match="samples.csv is damaged"):
        trial.qualities("fp32")


def test_every_variant_is_trained_with_one_seed_before_the_next(tmp_path):
    trials = small_study(tmp_path).trials()
    assert [(trial.training, trial.seed) for trial in trials] == [
        (name, seed) for seed in (0, 1) for name in ("fp32", "bf16", "fp16")
    ]


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
