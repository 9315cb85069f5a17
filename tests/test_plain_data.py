"""Values in checkpoints that cannot be meant are refused in one line that names them, and nothing else is raised."""

import copy
import importlib
import math
import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import runtime
from models import EqM
from network_settings import EqM_models, NetworkSettings
from precision import Precision
from runs.checkpoint import load_checkpoint, save_checkpoint, seal
from runs.config import Config, config_of
from runs.load_network import load_network
from runs.record import Metrics, read_metrics
from runs.resume import config_of_run, newest_good
from runtime.errors import UserError
from state import TrainingState

CPU = torch.device("cpu")
NETWORK = NetworkSettings("tiny", (4, 16, 16), 3, num_classes=2, temporal_patch=2)
FLAGS = {"lr": 0.5, "no_flip": True, "frame_interval": 2, "micro_batch_size": None, "global_seed": 7, "keep": 3}
CONFIG = Config(NETWORK, ("A", "B"), 12.5, {"name": "fp32", "tf32": False}, flags=FLAGS, class_counts=(3, 4))
FP16 = Precision("fp16", "fp16", torch.float16)
GONE = object()
HUGE = 10**500


@pytest.fixture(scope="module")
def good() -> Iterator[dict]:
    """The contents of a good checkpoint in fp16, after one update, of a network of some thousand parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EqM_models, "tiny", partial(EqM, patch_size=8, hidden_size=8, depth=1, num_heads=1))
        state = TrainingState(NETWORK.build(), FP16, CPU)
        state.step = 1
        yield state.assemble(state.snapshot()) | {"epoch": 0, "config": CONFIG.as_dict()}


def go_on(path: Path) -> None:
    """What a training does that goes on from a checkpoint."""
    saved = load_checkpoint(path)
    config = config_of(saved["config"], path)
    TrainingState(config.network.build(), FP16, CPU).load_state_dict(saved)


def mutated(good: dict, place: tuple, value: object, path: Path) -> Path:
    """Saves the contents with one value replaced, removed, or changed by a function."""
    contents = copy.deepcopy(good)
    inside = contents
    for key in place[:-1]:
        inside = inside[key]
    if value is GONE:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value(inside[place[-1]]) if callable(value) else value
    torch.save(contents, path)
    seal(path)
    return path


def assert_refused(load: Callable, path: Path, *words: str) -> None:
    with warnings.catch_warnings(), pytest.raises(UserError) as refused:
        warnings.simplefilter("error")
        load(path)
    said = str(refused.value)
    assert str(path) in said
    assert said.isprintable(), "one line, without control characters"
    assert len(said) < 500
    assert any(word in said for word in words), said


def test_the_good_one_is_taken_by_both(good, tmp_path):
    infinite_loss = {"sums": torch.tensor([math.inf, 1.0, 1.0]), "largest_norm": torch.ones(())}
    save_checkpoint(tmp_path / "good.pt", good | {"since_log": infinite_loss})
    go_on(tmp_path / "good.pt")
    loaded = load_network(tmp_path / "good.pt")
    assert (loaded.classes, loaded.config, loaded.vae) == (["A", "B"], CONFIG, None)
    x = torch.zeros(2, 3, 4, 16, 16)
    assert loaded.network(x, torch.zeros(2), torch.tensor([0, 2])).shape == x.shape


# What stands in the config, and the values that it cannot have. Both loaders read it.
NUMBERS = ["3", None, True, 0, -1, 2**63, HUGE, 1.5, [1], torch.ones(())]
CONFIG_WRONG = {
    ("network",): [GONE, None, "tiny", []],
    ("network", "model"): [GONE, 3, None, "EqM-Ti/3", "x\n" * 10**5],
    ("network", "input_size"): [GONE, [], [4, 16], [4, 16, 16, 16], [4, 16, 8], [4, -16, -16], [0, 16, 16], 0, -8]
    + [[2**62, 16, 16], [4, 17, 17], [3, 16, 16], ["4", "16", "16"], {}, 16.0, HUGE, 16],
    ("network", "in_channels"): [GONE, 4, *NUMBERS],
    ("network", "num_classes"): [GONE, 1, 3, 2**62, *NUMBERS],
    ("network", "temporal_patch"): [3, *NUMBERS],
    ("network", "uncond"): [0, "True", None],
    ("network", "energy"): ["", "l3", None, 3],
    ("network", "rope"): [True],
    ("objective",): [None, [], {"speed": 3}],
    ("objective", "path"): ["linear", None, 3],
    ("objective", "schedule"): ["flat", None],
    ("objective", "a"): [0, 1, -1, math.nan, "0.8", None, HUGE],
    ("objective", "scale"): [0.0, -4.0, math.inf, math.nan, "4", None, True],
    ("objective", "dispersion"): [-0.5, math.nan, None],
    ("classes",): [GONE, None, 3, "AB", [], ["A", 3], ["A", "B", "C"], ["A", "A"], {"A": 0}],
    ("frames_per_second",): [GONE, None, 0, -1.0, math.nan, math.inf, "12", True, HUGE],
    ("precision",): [GONE, None, "fp32", {}, {"name": None}, {"name": ["fp32"]}, {3: "fp32"}],
    ("vae",): [3, {}, {"name": "ema"}, "ema"],
    ("global_batch_size",): ["64", 0, -1, 1.5, HUGE],
    ("processes",): ["1", 0, -1],
    ("args",): [None, [], {3: 3}, {"lr": [1]}, {"keep": HUGE}, {"keep": {}}, {"keep": torch.ones(3)}],
    ("args", "lr"): [None, "1e-4", 0, -1.0, math.nan, math.inf, True],
    ("args", "frame_interval"): [None, 0, -1, 1.5, "3", 2**63],
    ("args", "ema_decay"): [1.0, -0.1, None, math.nan],
    ("args", "micro_batch_size"): [0, -1, "4"],
    ("args", "global_seed"): [None, -1, 2**63, "7"],
    ("class_counts",): [3, [3], [3, -4], ["3", "4"], [3, 4, 5], [3, HUGE]],
    ("flavour",): ["new"],
}


class Odd:
    """An object of another program."""


Odd.__module__ = "omegaconf.dictconfig"


@pytest.mark.parametrize("load", [load_checkpoint, load_network])
@pytest.mark.parametrize(
    ("value", "name"),
    [(Path("data"), "PosixPath"), (np.float64(3), "numpy"), (Odd(), "omegaconf.dictconfig.Odd")],
    ids=["path", "numpy", "omegaconf"],
)
def test_a_whole_file_with_other_objects_names_their_type(good, tmp_path, monkeypatch, load, value, name):
    monkeypatch.setitem(sys.modules, "omegaconf", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", SimpleNamespace(Odd=Odd))
    torch.save({"ema": good["ema"], "args": {"value": value}}, tmp_path / "given.pt")
    assert_refused(load, tmp_path / "given.pt", name)


@pytest.mark.parametrize("load", [load_checkpoint, load_network])
@pytest.mark.parametrize("other", [{"pytorch-lightning_version": "2"}, {"config": {"width": 3}}, {"x\n" * 999: 1}])
def test_where_no_weights_are_the_keys_that_are_there_are_named(good, tmp_path, load, other):
    torch.save({"state_dict": good["ema"], **other}, tmp_path / "given.pt")
    assert_refused(load, tmp_path / "given.pt", f", but 'state_dict', {ascii(next(iter(other)))[:15]}")


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.timeout(30)
def test_a_pipe_in_the_place_of_a_file_of_a_run_is_not_waited_for(pipe, tmp_path, caplog):
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/0000010.pt", "config.json", "metrics.jsonl", "log.txt", "wandb-id.txt"):
        (tmp_path / name).symlink_to(pipe)
    assert_refused(load_network, tmp_path / "checkpoints" / "0000010.pt", "no checkpoint")
    assert newest_good(tmp_path)[0] is None
    assert "is a folder, a pipe or a device" in newest_good(tmp_path)[1][0]
    assert config_of_run(tmp_path) is None
    with pytest.raises(UserError, match="metrics.jsonl cannot be read: it is a folder, a pipe or a device"):
        read_metrics(tmp_path, ["step"])
    metrics = Metrics(tmp_path, CPU, samples=0, step=0)
    metrics.append({"step": 3})
    assert "metrics.jsonl lacks the line of step 3" in caplog.text


DAMAGED = {
    "cut off": b'{"step": 2, "lo',
    "without an end": b'{"step": 2, "loss": 1.0}',
    "beyond a float": b'{"step": 1%s, "loss": 1.0}\n' % (b"0" * 400),
    "of 5,000 digits": b'{"step": 1%s, "loss": 1.0}\n' % (b"0" * 5000),
    "beyond the floats of a run": b'{"step": 2, "loss": 1e300}\n',
    "before the first step": b'{"step": -1, "loss": 1.0}\n',
    "infinite": b'{"step": 1e999, "loss": 1.0}\n',
    "nested": b"[" * 200_000 + b"\n",
    "nested in a value": b'{"step": 2, "loss": %s}\n' % (b"[" * 200_000),
    "a text for a number": b'{"step": "2", "loss": 1.0}\n',
    "a list": b"[1, 2]\n",
    "no UTF-8": b'{"step": \xff}\n',
    "zeros": bytes(100) + b"\n",
    "null": b'{"step": null, "loss": 1.0}\n',
    "without a loss": b'{"step": 2}\n',
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_line_of_metrics_is_left_out_with_a_word(tmp_path, caplog, line):
    good = [b'{"step": 1, "loss": 2.5}\n', b'{"step": 2, "loss": NaN}\n']
    half = not line.endswith(b"\n")
    (tmp_path / "metrics.jsonl").write_bytes(good[0] + line + (b"" if half else good[1]))
    assert [row["step"] for row in read_metrics(tmp_path, ["step", "loss"])] == ([1] if half else [1, 2])
    assert "damaged lines are left out: 1, the first is line 2" in caplog.text
    if line not in (DAMAGED["without a loss"], DAMAGED["beyond the floats of a run"]):  # their step is known
        Metrics(tmp_path, CPU, samples=0, step=1)
        assert "damaged lines are removed: 1" in caplog.text
        assert (tmp_path / "metrics.jsonl").read_bytes() == good[0]


@pytest.mark.parametrize("text", ['{"network": {', "[" * 200_000, "{}", '{"network": 1e999}', "1" * 5000, "null"])
def test_a_damaged_config_of_a_run_is_passed_over_with_a_word(tmp_path, caplog, text):
    (tmp_path / "config.json").write_text(text)
    assert config_of_run(tmp_path) is None
    assert f"{tmp_path}/config.json" in caplog.text
    assert "passed over" in caplog.text


def test_windows_is_told_in_one_line_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="^error: .* on Windows, run it in WSL$"):
        importlib.reload(runtime)


def change(value: float) -> Callable[[Tensor], Tensor]:
    """Replaces the last number of a tensor."""

    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return changed


def quantised(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will drop them
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


TENSORS = {
    "missing": GONE,
    "None": None,
    "a number": 3.5,
    "a list": lambda tensor: tensor.tolist(),
    "sparse": lambda tensor: tensor.to_sparse(),
    "quantised": quantised,
    "without data": lambda tensor: tensor.to("meta"),
    "int64": lambda tensor: tensor.long(),
    "bool": lambda tensor: tensor.bool(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "of one more dimension": lambda tensor: tensor[None],
    "empty": lambda tensor: torch.empty(0),
    "expanded to 2^60 elements": lambda tensor: torch.zeros(1).expand(2**30, 2**30),
    "NaN": change(math.nan),
    "infinite": change(math.inf),
    "-infinite": change(-math.inf),
}
STATE_WRONG = {
    ("step",): [-1, 2**63, HUGE, 1.0, "1", None, True, torch.ones(()), GONE],
    ("skipped",): [-1, 2**63, "0", None, GONE],
    ("samples",): [-1, 2**63, 0.5, None, GONE],
    ("epoch",): [-1, 2**63, "0", GONE],
    ("model",): [GONE, None, [], {}, OrderedDict(), "weights", {"w": torch.ones(1)}, {3: torch.ones(1)}],
    ("opt",): [GONE, None, {}, [], {"step": torch.ones(())}, {"state": {}, "param_groups": []}],
    ("opt", "step"): [change(-1.0)],
    ("opt", "exp_avg_sq"): [change(-1.0)],
    ("scaler",): [GONE, None, [], {"scale": 1.0}, {"scale": "1"}],
    ("scaler", "scale"): [0.0, -1.0, math.nan, math.inf, "65536", None, torch.ones(())],
    ("scaler", "growth_interval"): [0, -1, 2.5, None],
    ("scaler", "_growth_tracker"): [-1, 2**63, 0.5],
    ("since_log",): [GONE, None, {}, {"sums": torch.zeros(3)}],
    ("since_log", "sums"): [lambda tensor: tensor[:2], lambda tensor: tensor.to_sparse(), lambda tensor: tensor.long()],
    ("bad_steps",): [GONE, None, torch.zeros(3), torch.tensor([0.0, -1.0]), torch.tensor([0.0, math.nan])],
    ("moments",): [{}],
}
PLACES = [("opt", "exp_avg"), ("model", "x_embedder.proj.weight"), ("ema", "pos_embed")]


@pytest.mark.parametrize("place", CONFIG_WRONG, ids=".".join)
def test_a_wrong_value_in_a_config_is_refused_by_name(good, tmp_path, place):
    for i, value in enumerate(CONFIG_WRONG[place]):
        path = mutated(good, ("config", *place), value, tmp_path / f"{i}.pt")
        for load in (go_on, load_network) if i == 0 else (go_on,):
            assert_refused(load, path, place[-1], "multiple of", "another network")


@pytest.mark.parametrize("place", STATE_WRONG, ids=".".join)
def test_a_wrong_value_in_the_state_of_a_training_is_refused_by_name(good, tmp_path, place):
    for i, value in enumerate(STATE_WRONG[place]):
        assert_refused(go_on, mutated(good, place, value, tmp_path / f"{i}.pt"), place[-1], "optimizer's", "network")


@pytest.mark.parametrize("place", PLACES, ids=".".join)
@pytest.mark.parametrize("value", TENSORS.values(), ids=TENSORS.keys())
def test_a_wrong_tensor_is_refused_by_name(good, tmp_path, place, value):
    path = mutated(good, place, value, tmp_path / "wrong.pt")
    assert_refused(go_on, path, place[-1], "optimizer's")
    if place[0] == "ema":
        assert_refused(load_network, path, place[-1], "ema")
