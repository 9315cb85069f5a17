"""Speedruns: what counts as a record, the commands of an attempt, the table, and one small record as people run it."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import sample_gd
import speedrun
import train
from conftest import run_python, run_script
from measuring import records
from measuring.records import Attempt, make_data
from measuring.tracks import TRACKS, TRACKS_OWN, Qualities, Recipe
from measuring.trials import STUDIES
from runtime.errors import UserError

TARGET = Qualities(clip_error=0.05, right=0.9, frechet=1.0, recall=0.5)


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"clip_error": 0.04, "right": 1.0, "frechet": 0.5, "recall": 0.9}, []),
        ({"clip_error": 0.0501}, ["clip_error"]),
        ({"frechet": 1.1, "recall": 0.4}, ["frechet", "recall"]),
        ({"right": float("nan")}, ["right"]),
        ({"clip_error": float("nan")}, ["clip_error"]),
    ],
)
def test_a_target_is_met_if_no_quality_is_worse(changed, missed):
    assert replace(TARGET, **changed).missed(TARGET) == missed


def report(right: float, frechet: float, recall: float) -> dict:
    metrics = [{"metric": "Fréchet distance (not FID or FVD)", "value": frechet}, {"metric": "recall", "value": recall}]
    shares = {"shape": {"share": 1}, "direction": {"share": 1}, "both": {"share": right}}
    return {"comparisons": [{"features": "pixels", "metrics": metrics}], "judge": {"generated": shares}}


class Commands:
    """Stands for the commands of an attempt, and remembers them. Every step's clip error and report are given."""

    def __init__(self, steps: dict[int, tuple[float, dict]]):
        self.steps, self.lines, self.variables = steps, [], {}

    def __call__(self, log: Path, script: Path, *flags: object, variables: dict | None = None) -> None:
        words = [str(flag) for flag in flags]
        self.lines.append([script.name, *words])
        self.variables |= variables or {}

        def value(name: str) -> Path:
            return Path(words[words.index(name) + 1])

        if script.name == "train.py":
            run = value("--results-dir") / "000-EqM-Ti-4-Linear-velocity-None"
            (run / "checkpoints").mkdir(parents=True)
            rows = [{"step": 1, "training_seconds": 0.5}]  # the log's first line has no held-out loss
            for step, (error, _) in self.steps.items():
                rows.append({"step": step, "training_seconds": step / 10, "held_out_clip_error": error})
                (run / "checkpoints" / f"{step:07d}.pt").touch()
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif script.name == "evaluate.py":
            value("--output").write_text(json.dumps(self.steps[int(words[1].rpartition("-")[2])][1]))

    def sampled(self) -> list[int]:
        """The steps of the checkpoints that were sampled."""
        lines = [line for line in self.lines if line[0] == "sample_gd.py"]
        return [int(Path(line[line.index("--ckpt") + 1]).stem) for line in lines]


GOOD, BAD = report(0.95, 0.9, 0.6), report(0.95, 0.9, 0.4)


@pytest.fixture
def attempt(tmp_path) -> Attempt:
    recipe = Recipe("--lr 1 --max-steps 500", "--stepsize 0.1")
    return Attempt(TRACKS["cpu"], "adamw", recipe, 7, tmp_path / "data", tmp_path / "out")


@pytest.fixture
def run(monkeypatch) -> Callable[[dict], Commands]:
    def stand_in(steps: dict[int, tuple[float, dict]]) -> Commands:
        commands = Commands(steps)
        monkeypatch.setattr(records, "run_logged", commands)
        return commands

    return stand_in


def test_the_record_is_the_first_checkpoint_that_meets_all_and_only_good_errors_are_sampled(attempt, run):
    commands = run({100: (0.06, GOOD), 200: (0.05, BAD), 300: (0.051, GOOD), 400: (0.04, GOOD), 500: (0.03, GOOD)})
    row = attempt.race(TARGET)
    assert commands.sampled() == [200, 400]
    assert (row["reached"], row["step"], row["seconds"]) == (True, 400, 40.0)
    assert [(each["step"], each["missed"]) for each in row["tried"]] == [(200, ["recall"]), (400, [])]
    assert row["tried"][1] | {"right": 0.95, "frechet": 0.9, "recall": 0.6, "clip_error": 0.04} == row["tried"][1]
    assert row["curve"][:2] == [(10.0, 0.06), (20.0, 0.05)]
    assert (row["track"], row["recipe"], row["seed"]) == ("cpu", "adamw", 7)
    kept = list((attempt.output / "adamw-seed7" / "runs").glob("*/checkpoints/*.pt"))
    assert [path.name for path in kept] == ["0000400.pt"]


def test_a_target_that_no_checkpoint_meets_is_said_and_not_counted(attempt, run):
    commands = run({100: (0.06, GOOD), 200: (0.04, BAD)})
    row = attempt.race(TARGET)
    assert (row["reached"], commands.sampled()) == (False, [200])
    assert not row.keys() & {"step", "seconds"}


def test_an_attempt_trains_anew_with_the_flags_of_track_recipe_and_seed_and_compiles_anew(attempt, run):
    (attempt.folder / "runs" / "999-EqM-old").mkdir(parents=True)
    commands = run({100: (0.04, GOOD)})
    attempt.race(TARGET)
    train_line, sample_line, evaluate_line = (" ".join(line) for line in commands.lines)
    folder = attempt.folder
    for flags in (
        f"--data-path {attempt.data}/train-pack --eval-path {attempt.data}/test-pack",
        "--eval-every 100 --eval-samples 32 --ckpt-every 100",
        f"{attempt.track.form} --log-every 100 --global-seed 7 --lr 1 --max-steps 500",
    ):
        assert flags in train_line
    assert f"--num-fid-samples {attempt.track.samples} --global-seed 1007 {attempt.track.sampling}" in sample_line
    assert sample_line.endswith("--stepsize 0.1")
    assert evaluate_line.startswith(f"evaluate.py {attempt.data}/train-pack {folder}/samples-100 --judge")
    assert commands.variables.keys() == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    assert all(str(folder.resolve()) in value for value in commands.variables.values())
    assert not list(folder.glob("runs/999*"))


def test_the_target_is_measured_after_its_own_steps_and_is_a_mean(attempt, run):
    commands = run({100: (0.06, GOOD), 200: (0.04, BAD)})
    found = attempt.measure()
    assert commands.lines[0][-2:] == ["--max-steps", "400"]
    assert found == Qualities(0.04, 0.95, 0.9, 0.4)
    assert records.means([found, replace(found, clip_error=0.06, recall=0.6)]) == Qualities(
        0.05, 0.95, 0.9, pytest.approx(0.5)
    )


def test_a_path_without_a_clip_error_is_one_line(attempt, run):
    run({})
    with pytest.raises(UserError, match="has no held_out_clip_error: take a --path-type"):
        attempt.race(TARGET)


def test_data_are_made_once_and_again_if_their_commands_change(tmp_path, monkeypatch):
    lines = []

    def stand_in(log: Path, script: Path, *flags: object) -> None:
        log.parent.mkdir(exist_ok=True)
        lines.append(" ".join([script.name, *map(str, flags)]))

    monkeypatch.setattr(records, "run_logged", stand_in)
    data, clip_art = tmp_path / "data", TRACKS["clip-art-64"]
    make_data(clip_art, data, Path("png"))
    assert lines[0] == f"make_clip_art.py png {data} --size 64"
    assert lines[1] == f"prepare.py {data}/train {data}/train-pack --image-size 64"
    make_data(clip_art, data, Path("png"))
    assert len(lines) == 3
    make_data(clip_art, data, Path("other"))
    assert len(lines) == 6


@pytest.mark.parametrize("name", TRACKS)
def test_the_flags_of_every_recipe_are_flags_of_the_commands_and_leave_the_task_alone(name, monkeypatch):
    track = TRACKS[name]
    for recipe in track.recipes.values():
        assert not set(recipe.training.split() + recipe.sampling.split()) & set(TRACKS_OWN)
        words = ["train.py", "--data-path", "data", *track.form.split(), *recipe.training.split()]
        monkeypatch.setattr(sys, "argv", words)
        args, _ = train.parse_args()
        # What a record says is whole: no flag of the objective, the network or the optimizer has its default.
        for flag in ("model", "lr", "path_type", "c_schedule", "c_lambda", "predict", "ebm", "uncond", "optimizer"):
            assert getattr(args, flag) is not None, flag
        assert args.max_steps > track.steps
        assert track.steps % track.every == 0
        words = ["sample_gd.py", "--ckpt", "x.pt", *track.sampling.split(), *recipe.sampling.split()]
        monkeypatch.setattr(sys, "argv", words)
        sample_gd.parse_args()


@pytest.mark.parametrize("name", ["output", "optimizer", "evaluations"])
def test_the_variants_of_a_study_are_flags_of_the_commands(name, monkeypatch):
    study = STUDIES[name]
    assert study.trainings.keys() == study.samplings.keys()
    for training, flags in study.trainings.items():
        assert "/" not in training, "it names a folder"
        monkeypatch.setattr(sys, "argv", ["train.py", "--data-path", "data", *flags.split()])
        train.parse_args()
        for sampling in study.samplings[training].values():
            monkeypatch.setattr(sys, "argv", ["sample_gd.py", "--ckpt", "x.pt", *sampling.split()])
            sample_gd.parse_args()


def test_both_optimizers_have_the_same_search_of_rates():
    rates = {}
    for flags in STUDIES["optimizer"].trainings.values():
        words = flags.split()
        rates.setdefault(words[words.index("--optimizer") + 1], []).append(words[words.index("--lr") + 1])
    assert rates["adamw"] == rates["muon"]
    assert len(rates["muon"]) > 2


def refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *flags: object) -> str:
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *map(str, flags)])
    try:
        speedrun.main()
    except UserError as error:
        return str(error)
    except SystemExit:
        return capsys.readouterr().err
    return ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["cpu", "--recipe", "magic"], "--recipe magic: cpu has adamw"),
        (["cpu", "--train-flags=--lr 1 --image-size=8"], "--image-size belongs to the track"),
        (["cpu", "--sample-flags=--num-sampling-steps 9"], "--num-sampling-steps belongs to the track"),
        (["cpu", "--measure-target", "--train-flags=--lr 1"], "--measure-target measures the recipe adamw as it is"),
        (["cpu", "--seeds", 1, 2, 1], "a seed stands there twice"),
        (["shapes-64"], "nobody has measured the target of shapes-64: run python EqM/speedrun.py shapes-64 --measure"),
    ],
)
def test_what_would_be_no_record_is_refused_before_any_work(flags, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, monkeypatch, *flags)
    assert not list(tmp_path.iterdir())


def row(seed: int, reached: bool = True, **changed: object) -> dict:
    met = {"seconds": 10.0 + seed, "step": 100 * seed} if reached else {}
    tried = [{"step": 1, "clip_error": 0.04, "right": 0.95, "frechet": 0.8, "recall": 0.6, "missed": []}]
    about = {"recipe": "adamw", "training": "--lr 1", "sampling": "", "machine": "M", "versions": "V", "jobs": 1}
    about |= {"commit": "c", "date": "2026-11-28", "seed": seed, "reached": reached, "tried": tried, "curve": [[1, 2]]}
    return about | met | changed


def test_the_table_has_mean_and_spread_over_seeds_and_no_mean_if_a_seed_failed():
    track = replace(TRACKS["cpu"], target=TARGET)
    rows = [row(1), row(3), row(1, recipe="adamw+"), row(2, reached=False, recipe="adamw+")]
    lines = speedrun.table(track, rows).splitlines()
    assert lines[0].startswith("| recipe | seconds | steps | clip error | judged right |")
    assert lines[2] == "| target |  |  | 0.05 | 0.9 | 1 | 0.5 |  |"
    assert lines[3] == "| adamw | 12 ± 1.4 | 200 ± 1.4e+02 | 0.04 ± 0 | 0.95 ± 0 | 0.8 ± 0 | 0.6 ± 0 | 2 of 2 |"
    assert lines[4] == "| adamw+ | – | – | 0.04 | 0.95 | 0.8 | 0.6 | 1 of 2 |"
    assert "adamw: M, V, 2026-11-28, c" in lines
    assert f"  train.py {track.form} --lr 1" in lines


def test_rows_of_another_machine_commit_or_number_of_jobs_stand_apart():
    rows = [row(1), row(2), row(1, machine="N"), row(1, commit="d"), row(1, jobs=2)]
    assert [len(group) for group in speedrun.groups_of(rows)] == [2, 1, 1, 1]


def test_the_last_row_of_a_seed_counts_and_a_damaged_row_is_named(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    for each in (row(1), row(2), row(1, seconds=99.0), row(3, reached=False)):
        speedrun.add_row(path, each)
    assert "adamw, seed 2: 12.0 s, 200 steps" in capsys.readouterr().out
    assert [(each["seed"], each.get("seconds")) for each in speedrun.read_rows(path)] == [(1, 99), (2, 12), (3, None)]
    with path.open("a") as file:
        file.write('{"recipe": 1\n')
    with pytest.raises(UserError, match="line 5 of .*records.jsonl is damaged: remove it"):
        speedrun.read_rows(path)


def test_a_row_names_machine_versions_date_and_commit():
    found = speedrun.machine()
    assert found.keys() == {"machine", "versions", "date", "commit"}
    assert all(found.values())


def test_a_command_that_fails_ends_the_speedrun_with_one_line(tmp_path):
    run = run_script("speedrun.py", "clip-art-64", "--measure-target", "--source", tmp_path / "nowhere", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("speedrun.py: error: make_clip_art.py ended with status 1: read ")
    (log,) = (tmp_path / "results").glob("*/data/log0.txt")
    assert "has no folders of PNG files" in log.read_text()


@pytest.mark.slow
def test_the_small_record_reaches_its_target_on_a_cpu(tmp_path):
    result = run_python("speedrun.py", "cpu", "--seeds", 1, "--output", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (row,) = speedrun.read_rows(tmp_path / "out" / "records.jsonl")
    assert row["reached"], row
    assert 0 < row["seconds"] < row["whole_seconds"]
    assert row["curve"] == sorted(row["curve"])
    assert "1 of 1" in result.stdout
    assert (tmp_path / "out" / "curve.png").stat().st_size > 0
    commands = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("python ")]
    assert [command[1] for command in commands[3:6]] == ["EqM/train.py", "EqM/sample_gd.py", "EqM/evaluate.py"]
