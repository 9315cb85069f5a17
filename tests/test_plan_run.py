"""What a training would cost, before it is started."""

from dataclasses import replace

import pytest
import torch

from compiled import EAGER
from conftest import make_pack, run_python, run_script
from measuring import costs
from measuring.costs import Costs, DataCosts, Machine, StepCosts, duration, time_steps
from measuring.workloads import Work
from precision import Precision

GB = 10**9
CPU = torch.device("cpu")
FP32 = Precision("fp32", "fp32", torch.float32)
# 1,000 clips of 10 frames. A core decodes 100 clips a second, and the device trains on 200.
DATA = DataCosts(1000, 4, 64, 1, 10.0, 0.01, 0.001, {"pixels": 3 * GB, "latents": 2 * GB})
STEP = StepCosts(0.5, 100, 100, 10**8, None, 1.0)
MACHINE = Machine(CPU, 1, 4, 16 * GB, 5 * GB)
FLAGS = "--video --clip-len 4 --image-size 16 --model EqM-Ti/8 --batch 4".split()
ROWS = ("data", "step", "steps a day", "epochs a day", "decoding", "pack of pixels", "checkpoint", "host memory")


def test_the_command_says_what_a_small_set_would_cost(shapes, tmp_path):
    (shapes / "CircleUp" / "broken.avi").write_bytes(b"no video")
    try:
        run = run_script("plan_run.py", shapes, *FLAGS, cwd=tmp_path)
    finally:
        (shapes / "CircleUp" / "broken.avi").unlink()
    assert run.returncode == 0, run.stderr
    rows = dict(line.split("  ", 1) for line in run.stdout.splitlines())
    assert [*rows] == [*ROWS, "limits first, from files", "limits first, from a pack"]
    rows = {name: text.strip() for name, text in rows.items()}
    opened = "17 were opened, and 1 of them cannot be read"
    assert rows["data"] == f"17 files of 4 classes, about 16 frames each ({opened})"
    assert " for 4 samples on 1 × CPU, 1 threads" in rows["step"]
    assert rows["pack of pixels"].startswith("0.000209 GB (")  # 17 · 16 · 16 · 16 · 3 bytes
    assert float(rows["steps a day"].replace(",", "")) > 1000
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_runs_from_its_start_on_images_too(tmp_path):
    from PIL import Image

    for i in range(6):
        (tmp_path / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / "images" / f"class{i % 2}" / f"{i}.png")
    run = run_python("plan_run.py", "images", "--image-size", 16, "--model", "EqM-Ti/4", "--batch", 4, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "6 files of 2 classes (6 were opened" in run.stdout


@pytest.mark.parametrize(
    ("changes", "files", "pack"),
    [
        ({}, "the arithmetic of CPU", "the arithmetic of CPU"),
        ({"sample_s": 0.1}, "decoding: 4 cores reach 20% of the speed; make a pack of latents", "the arithmetic"),
        ({"free_disk": GB}, "the arithmetic", "the disk: 2.0 GB of latents do not fit"),
        ({"memory": 2 * GB}, "host memory: lower --batch", "host memory: lower --batch"),
    ],
    ids=str,
)
def test_what_limits_first(changes, files, pack):
    def changed(costs: object) -> object:
        return replace(costs, **{name: value for name, value in changes.items() if hasattr(costs, name)})

    found = Costs(changed(DATA), STEP, changed(MACHINE))
    assert found.limit(packed=False).startswith(files)
    assert found.limit(packed=True).startswith(pack)


def test_the_figures_follow_from_what_was_measured():
    rows = dict(Costs(DATA, STEP, MACHINE).rows())
    assert rows["step"].startswith("500 ms for 100 samples")
    assert rows["steps a day"] == "172,800"
    assert rows["epochs a day"].startswith("1.73e+04 (")
    assert rows["decoding"] == "2 of 4 cores: training takes 200 samples a second, and a core decodes 100"
    assert rows["pack of latents"].endswith("making it takes 2.5 s and the VAE's time")
    assert rows["checkpoint"] == "1.6 GB of disk each"
    assert rows["host memory"] == "2.6 of 16 GB"
    assert [duration(s) for s in (0.0125, 1, 90, 5400, 2e5)] == ["12.5 ms", "1 s", "1.5 min", "1.5 h", "2.31 days"]


def test_a_step_that_would_take_minutes_is_computed_and_not_timed(monkeypatch):
    monkeypatch.setattr(costs, "product_speed", lambda: 1e6)
    monkeypatch.setattr(costs, "Training", None)
    found = time_steps(Work("", "train", "EqM-Ti/8", 16, 8), FP32, EAGER, CPU)
    assert found.timed == 0
    assert found.seconds > 8 * 10


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "3"], "--batch 4 is not a multiple of 3 GPUs"),
        (["--image-size", "18"], "image size 18x18 is not a multiple of the patch size 8"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(shapes, tmp_path, flags, words):
    run = run_script("plan_run.py", shapes, *FLAGS, *flags, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert words in run.stderr and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["a pack", "nothing readable", "nothing"])
def test_a_folder_that_tells_nothing_is_one_line(shapes, tmp_path, kind):
    folder = tmp_path / "data"
    (folder / "class").mkdir(parents=True)
    if kind == "a pack":
        folder = make_pack(shapes, tmp_path / "pack").folder
    elif kind == "nothing readable":
        (folder / "class" / "broken.avi").write_bytes(b"no video")
    words = {"a pack": "is a pack", "nothing": "no videos in"}.get(kind, "no file of the sample can be read")
    run = run_script("plan_run.py", folder, *FLAGS, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert words in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
