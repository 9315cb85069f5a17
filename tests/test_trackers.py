"""What TensorBoard and Weights & Biases get of a run."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import SMALL, run_script
from drawing.pictures import gif, read_png
from runs.trackers import Preview, Trackers
from runtime.errors import UserError
from test_train import NAME, metrics, trained

WATCHED = ["--log-every", 1, "--ckpt-every", 2, "--resume", "--sample-every", 2, "--sample-steps", 2]
# A stand-in that notes what it is called with.
STAND_IN = """
import json
from pathlib import Path
from types import SimpleNamespace as Settings

def note(*what):
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps(what, default=str) + "\\n")

def Image(data):
    return ["image", list(data.shape)]

def Video(path, caption, format):
    return ["video", Path(path).stat().st_size > 0, caption, format]

class Run:
    def define_metric(self, name, step_metric):
        note("axis", name, step_metric)
    def log(self, row):
        note("log", row)
    def finish(self):
        note("finish")

def init(**settings):
    note("init", settings)
    return Run()
"""


def lose_newest_checkpoints(run: Path, *steps: int) -> None:
    for step in steps:
        (run / "checkpoints" / f"{step:07d}.pt").unlink()


def test_tensorboard_has_the_rows_of_metrics_the_sheets_and_the_clips_once_each_after_a_resume(shapes, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained(tmp_path, shapes, *WATCHED, "--tensorboard", "--max-steps", 5)
    run = tmp_path / "results" / NAME
    lose_newest_checkpoints(run, 4, 5)
    assert trained(tmp_path, shapes, *WATCHED, "--tensorboard", "--max-steps", 6) == run
    found = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert set(found.Tags()["scalars"]) == rows[0].keys() - {"step"}
    for name in rows[0].keys() - {"step"}:
        events = [(event.step, event.value) for event in found.Scalars(name)]
        assert events == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]

    sheets = found.Images("samples")
    assert [event.step for event in sheets] == [2, 4, 6]  # 5 was the end of what is gone
    right = read_png(run / "samples" / "0000006-sheet.png")
    assert np.array_equal(Image.open(io.BytesIO(sheets[-1].encoded_image_string)), right)
    clips = [tag for tag in found.Tags()["images"] if tag.startswith("videos/")]
    assert len(clips) == 16
    assert clips[5] == "videos/05 CircleUp"
    with Image.open(io.BytesIO(found.Images(clips[5])[-1].encoded_image_string)) as clip:
        assert (clip.format, clip.n_frames, clip.size) == ("GIF", 4, (16, 16))


def test_wandb_gets_the_rows_the_sheets_and_the_clips_as_one_run_after_a_resume(shapes, tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    trained(tmp_path, shapes, *WATCHED, "--wandb", "--max-steps", 5)
    run = tmp_path / "results" / NAME
    lose_newest_checkpoints(run, 4, 5)
    trained(tmp_path, shapes, *WATCHED, "--wandb", "--max-steps", 6)
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    first, second = (call[1] for call in calls if call[0] == "init")
    assert first["id"] == second["id"] == (run / "wandb-id.txt").read_text().strip()
    assert (first["name"], first["project"], first["resume"]) == (NAME, "EqM", "allow")
    assert first["config"]["network"]["model"] == "EqM-Ti/4"
    assert [call for call in calls if call[0] == "axis"] == [["axis", "*", "step"]] * 2
    logged = [call[1] for call in calls if call[0] == "log"]
    after_resume = [row for row in logged[8:] if "loss" in row]  # 5 rows and 3 sheets before
    assert after_resume == metrics(run)[2:]
    shown = [row for row in logged if "samples" in row]
    assert [row["step"] for row in shown] == [2, 4, 5, 4, 6]
    height, width, _ = read_png(run / "samples" / "0000006-sheet.png").shape
    assert shown[-1]["samples"] == ["image", [height, width, 3]]
    assert len(shown[-1]["videos"]) == 16
    assert shown[-1]["videos"][5] == ["video", True, "CircleUp", "mp4"]
    assert [call[0] for call in calls].count("finish") == 2


def test_wandb_logs_offline_to_a_file_of_the_same_run_after_a_resume(shapes, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (2, 4):
        trained(tmp_path, shapes, *WATCHED, "--wandb", "--max-steps", steps)
    run = tmp_path / "results" / NAME
    ident = (run / "wandb-id.txt").read_text().strip()
    files = list((run / "wandb").glob(f"offline-run-*-{ident}/run-{ident}.wandb"))
    assert files
    assert all(path.stat().st_size > 1000 for path in files)
    assert len(list((run / "wandb").glob("offline-run-*/files/media/images/samples_*.png"))) == 2
    assert len(list((run / "wandb").glob("offline-run-*/files/media/videos/videos_*.mp4"))) == 32


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, name):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{name}.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    run = run_script("train.py", "--data-path", "nowhere", f"--{name}", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines() == [f"train.py: error: --{name} needs {name}: pip install -r requirements-track.txt"]


def test_a_tracker_that_cannot_start_is_one_line(shapes, tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text("Settings = dict\ndef init(**_):\n    raise OSError('no network.')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    run = run_script("train.py", "--data-path", shapes, *SMALL, "--max-steps", 1, "--wandb", cwd=tmp_path)
    assert run.returncode == 1
    assert "--wandb cannot start: no network; WANDB_MODE=offline logs to a file" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(caplog):
    rows = []

    class Good:
        log = rows.append
        show = rows.append

        def close(self) -> None:
            rows.append("closed")

    class Bad:
        def log(self, row: dict) -> None:
            raise ConnectionError("the server is gone.\nmore")

    trackers = Trackers()
    trackers.working = {"bad": Bad(), "good": Good()}
    preview = Preview(1, np.zeros((1, 1, 3), np.uint8), [], [], [], None)
    trackers.log({"step": 1})
    trackers.log({"step": 2})
    trackers.show(preview)
    trackers.close()
    assert rows == [{"step": 1}, {"step": 2}, preview, "closed"]
    assert [record.message for record in caplog.records] == [
        "--bad has failed, and gets nothing more: the server is gone"
    ]


def test_no_tracker_starts_that_is_not_asked_for(tmp_path):
    trackers = Trackers()
    trackers.start([], tmp_path, 0, {})
    assert not trackers.working
    assert not list(tmp_path.iterdir())


def test_a_tracker_whose_folder_is_taken_cannot_start(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="--tensorboard cannot start"):
        Trackers().start(["tensorboard"], tmp_path, 0, {})


def test_a_gif_has_the_frames_in_order():
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    frames[1], frames[2] = 120, 250
    with Image.open(io.BytesIO(gif(frames, 10.0))) as image:
        levels = []
        for i in range(image.n_frames):
            image.seek(i)
            levels.append(int(np.asarray(image.convert("RGB")).mean()))
        assert (levels, image.info["duration"]) == ([0, 120, 250], 100)
