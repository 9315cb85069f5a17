"""A new run starts from the weights of another checkpoint, and data that have changed since a run began are named."""

import json
import logging
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import run_script
from models import EqM
from network_settings import EqM_models, NetworkSettings
from runs.checkpoint import save_checkpoint
from runs.config import Config, check_resumable
from runs.init_weights import start_from
from runs.resume import log_changes
from runtime.errors import UserError
from test_old_files import checkpoint  # noqa: F401
from test_train import assert_same, load
from train import parse_args

NETWORK = NetworkSettings("tiny", (4, 16, 16), 3, num_classes=3, temporal_patch=2)
CONFIG = Config(NETWORK, ("A", "B", "C"), 12.5, {"name": "fp32"}, class_counts=(5, 6, 7))
TABLE = "y_embedder.embedding_table.weight"
SHAPE = {"patch_size": 8, "hidden_size": 8, "depth": 1, "num_heads": 1}


@pytest.fixture(autouse=True)
def sizes(monkeypatch) -> None:
    """Networks of some thousand parameters."""
    changes = {"tiny": {}, "wide": {"hidden_size": 16}, "deep": {"depth": 2}, "fine": {"patch_size": 4}}
    for name, change in changes.items():
        monkeypatch.setitem(EqM_models, name, partial(EqM, **SHAPE | change))


def written(path: Path, config: Config = CONFIG, published: bool = False) -> dict:
    """Writes a checkpoint with random weights, which it returns."""
    torch.manual_seed(1)
    weights = {name: torch.randn(tensor.shape) for name, tensor in config.network.build().state_dict().items()}
    training = dict.fromkeys(("opt", "scaler", "step", "skipped", "epoch", "samples", "since_log", "bad_steps"))
    if published:
        torch.save({"ema": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)
    else:
        save_checkpoint(path, {"model": {}, "ema": weights, "config": config.as_dict(), **training})
    return weights


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("classes", [("A", "B", "C"), ("A", "B", "D"), ("A", "B"), ("A", "B", "C", "D")], ids="".join)
def test_the_table_of_labels_begins_anew_unless_the_classes_are_the_same(tmp_path, classes, published):
    weights = written(tmp_path / "first.pt", published=published)
    ours = replace(CONFIG, network=replace(NETWORK, num_classes=len(classes)), classes=classes)
    network = ours.network.build()
    table = network.state_dict()[TABLE].clone()
    notes = start_from(network, ours, tmp_path / "first.pt")
    same = classes == CONFIG.classes and not published
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, table if name == TABLE and not same else weights[name])
    assert str(tmp_path / "first.pt") in notes[0]
    assert any("table of labels was not loaded" in note for note in notes) != same


def test_pictures_of_another_size_and_clips_of_another_length_fit(tmp_path):
    weights = written(tmp_path / "first.pt")
    ours = replace(CONFIG, network=replace(NETWORK, input_size=(8, 32, 32)))
    network = ours.network.build()
    notes = start_from(network, ours, tmp_path / "first.pt")
    assert torch.equal(network.x_embedder.proj.weight, weights["x_embedder.proj.weight"])
    assert any("positions were not loaded" in note for note in notes)
    assert "--clip-len was 4 there and is 8 here" in notes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "wide"}, "is (48,) there and (96,) here"),
        ({"model": "deep"}, "is nothing there"),
        ({"model": "fine"}, "there and"),
        ({"temporal_patch": 1}, "there and"),
        ({"input_size": 16, "temporal_patch": 1}, "there and"),
        ({"in_channels": 4}, "there and"),
        ({"energy": "dot"}, "--ebm none, and this run has dot"),
        ({"clip_gain": 4.0}, "--predict field, and this run has clip"),
    ],
    ids=str,
)
def test_another_network_or_energy_is_refused_in_one_line(tmp_path, change, words):
    written(tmp_path / "first.pt")
    ours = replace(CONFIG, network=replace(NETWORK, **change))
    with pytest.raises(UserError) as refused:
        start_from(ours.network.build(), ours, tmp_path / "first.pt")
    assert str(refused.value).startswith(f"--init-weights {tmp_path / 'first.pt'} ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_ckpt_and_init_weights_exclude_each_other(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "train.py --data-path x --ckpt a.pt --init-weights b.pt".split())
    with pytest.raises(SystemExit):
        parse_args()
    assert "--init-weights: not allowed with argument --ckpt" in capsys.readouterr().err


def test_fine_tuning_to_other_classes_is_resumed_bitwise(checkpoint, shapes, tmp_path):  # noqa: F811
    for name in ("CircleUp", "SquareUp"):
        shutil.copytree(shapes / name, tmp_path / "data" / name.replace("Circle", "Star"))
    settings = (
        "--video --clip-len 4 --image-size 16 --model EqM-Ti/8 --num-workers 0 --global-batch-size 4 --log-every 1"
    )
    flags = ["--data-path", tmp_path / "data", *settings.split(), "--init-weights", checkpoint, "--resume"]

    def run(folder: str, steps: int) -> tuple[str, Path]:
        run = run_script("train.py", *flags, "--results-dir", folder, "--max-steps", steps, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        return run.stdout, max((tmp_path / folder).glob("*-EqM-Ti-8-Linear-velocity-None"))

    said, straight = run("straight", 3)
    assert f"--init-weights: started from the averaged weights of {checkpoint}" in said
    assert "the table of labels was not loaded" in said
    # Here lies the run whose weights these are. The data of the new run are not its own.
    run("results", 1)
    said, resumed = run("results", 3)
    assert "--init-weights" not in said, "only a new run reads it"
    ours, right = load(resumed, 3), load(straight, 3)
    for key in ours.keys() - {"config"}:
        assert_same(ours[key], right[key])
    assert ours["config"]["classes"] == ["SquareUp", "StarUp"]
    assert ours["config"]["class_counts"] == [4, 4]
    rows = [json.loads(line)["loss"] for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [f"step {i + 1}: loss {loss:.4f}" in said for i, loss in enumerate(rows)] == [False, True, True]


def test_classes_that_differ_are_named_and_refused():
    other = replace(CONFIG, network=replace(NETWORK, num_classes=4), classes=("B", "C", "D\n", "E"))
    with pytest.raises(UserError) as refused:
        check_resumable(CONFIG, other, Path("old.pt"))
    assert str(refused.value) == (
        "old.pt was trained on other classes: these data lack 'A', and have 'D\\n', 'E' in addition:"
        " to train on other classes, start a new run with --init-weights"
    )
    check_resumable(CONFIG, replace(CONFIG, class_counts=(1, 1, 1)), Path("old.pt"))


@pytest.mark.parametrize(
    ("counts", "said"),
    [((5, 6, 7), ""), ((5, 0, 9), "in 2 classes: B had 6 files and has 0, C had 7 files and has 9"), (None, "")],
)
def test_classes_whose_number_of_files_has_changed_are_named(caplog, counts, said):
    with caplog.at_level(logging.WARNING):
        log_changes(CONFIG, replace(CONFIG, class_counts=counts))
    assert [record.getMessage() for record in caplog.records] == ([f"the data have changed {said}"] if said else [])
