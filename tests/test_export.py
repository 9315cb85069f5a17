"""Networks as people exchange them: exported folders, safetensors, published weights, and the hub."""

import http.server
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save_file

import sample_gd
from conftest import run_script
from data.latents import LatentSpace
from drawing.pictures import write_png
from export import clips_of, export
from models import EqM
from network_settings import EqM_models, NetworkSettings
from objective import Objective
from runs.checkpoint import save_checkpoint
from runs.config import Config
from runs.exchange import CARD, CONFIG, PICTURE, WEIGHTS, find_place
from runs.init_weights import start_from
from runs.load_network import LoadedNetwork, load_network
from runtime.errors import UserError
from sampling.method import Method
from sampling.plan import Plan
from sampling.sampler import Sampler
from sampling.starts import Starts
from test_old_files import checkpoint as old_checkpoint  # noqa: F401

SHAPE = {"patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
NETWORK = NetworkSettings("tiny", (4, 16, 16), 3, num_classes=3, temporal_patch=2)
FLAGS = {"data_path": "/home/somebody/secret/shapes", "frame_interval": 2, "results_dir": "/home/somebody/results"}
CONFIG_OF_RUN = Config(NETWORK, ("A", "B"), 12.5, {"name": "bf16"}, flags=FLAGS, class_counts=(5, 6))
SPACE = LatentSpace("ema", "checksum", scale=0.5, channels=4, downsampling=2)
COUNTERS = dict.fromkeys(("opt", "scaler", "skipped", "epoch", "since_log", "bad_steps"))


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of some thousand parameters."""
    monkeypatch.setitem(EqM_models, "tiny", partial(EqM, **SHAPE))


def random_weights(settings: NetworkSettings) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    fixed = settings.build().state_dict()
    return {name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in fixed.items()}


def written(folder: Path, config: Config = CONFIG_OF_RUN) -> Path:
    """A checkpoint with random weights, in a run's folder."""
    path = folder / "run" / "checkpoints" / "0000040.pt"
    path.parent.mkdir(parents=True)
    contents = {"model": {}, "ema": random_weights(config.network), "config": config.as_dict()}
    save_checkpoint(path, contents | COUNTERS | {"step": 40, "samples": 640})
    return path


@pytest.fixture
def exported(tmp_path: Path, sizes: None) -> Path:
    export(written(tmp_path), tmp_path / "net", None)
    return tmp_path / "net"


def sampled(loaded: LoadedNetwork, method: Method) -> torch.Tensor:
    """Two samples, (2, …)."""
    network, config = loaded.network, loaded.config
    plan = Plan([0, 1], [], Starts(3, network.input_shape, objective=config.objective), (*loaded.classes, "no class"))
    sampler = Sampler(method, network, plan, config.seconds_per_frame, batch=2)
    with torch.no_grad():
        return sampler.descend(range(2), sampler.starts(range(2)), range(method.steps))


def same_weights(loaded: LoadedNetwork, weights: dict[str, torch.Tensor]) -> bool:
    ours = loaded.network.state_dict()
    return ours.keys() == weights.keys() and all(torch.equal(ours[name], weights[name]) for name in ours)


def test_an_exported_checkpoint_gives_the_same_samples_to_the_bit(old_checkpoint, tmp_path):  # noqa: F811
    run = run_script("export.py", old_checkpoint, "net", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in (tmp_path / "net").iterdir()} == {WEIGHTS, CONFIG, CARD}
    for ckpt, folder in ((old_checkpoint, "ours"), ("net", "theirs")):
        flags = ["--num-fid-samples", 4, "--num-sampling-steps", 3, "--stepsize", 0.05, "--cfg-scale", 1.5]
        run = run_script("sample_gd.py", "--ckpt", ckpt, "--folder", folder, *flags, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    for i in range(4):
        ours, theirs = ((tmp_path / folder / f"{i:06d}.mp4").read_bytes() for folder in ("ours", "theirs"))
        assert ours == theirs


def test_a_folder_and_a_file_of_safetensors_load_without_pickles(exported, tmp_path, monkeypatch):
    right = load_network(tmp_path / "run" / "checkpoints" / "0000040.pt")
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("runs.load_network.load_file", None)
    (exported / WEIGHTS).rename(exported / "other-name.safetensors")
    shutil.copy(exported / "other-name.safetensors", exported / WEIGHTS)
    for path in (exported, exported / "other-name.safetensors"):
        loaded = load_network(path)
        assert same_weights(loaded, right.network.state_dict())
        assert torch.equal(sampled(loaded, Method(steps=3)), sampled(right, Method(steps=3)))
        flags = {"frame_interval": 2}
        assert loaded.config == replace(CONFIG_OF_RUN, flags=flags), "no path of this machine is told to others"
    network, config = NETWORK.build(), CONFIG_OF_RUN
    start_from(network, config, exported)
    assert torch.equal(network.blocks[1].mlp.fc1.weight, right.network.blocks[1].mlp.fc1.weight)


def test_a_vaes_folder_is_told_by_its_name_alone(tmp_path):
    space = replace(SPACE, name=str(tmp_path / "my-vae"))
    network = replace(NETWORK, input_size=8, in_channels=4, temporal_patch=1)
    export(written(tmp_path, Config(network, ("A",), None, {"name": "fp32"}, space=space)), tmp_path / "net", None)
    assert json.loads((tmp_path / "net" / CONFIG).read_text())["vae"]["name"] == "my-vae"
    assert "'my-vae'" in (tmp_path / "net" / CARD).read_text()


def change_json(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        contents = json.loads((folder / CONFIG).read_text())
        contents["network"] |= changes.get("network", {})
        (folder / CONFIG).write_text(json.dumps(contents | {k: v for k, v in changes.items() if k != "network"}))

    return change


def change_tensors(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        tensors = load((folder / WEIGHTS).read_bytes())
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return changed


def pickled(folder: Path) -> None:
    torch.save(load((folder / WEIGHTS).read_bytes()), folder / WEIGHTS)


def pipe(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


BIAS = "x_embedder.proj.bias"
BAD_FOLDERS = {
    "without a config": (lambda folder: (folder / CONFIG).unlink(), "config.json is missing"),
    "without weights": (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors is missing"),
    "empty config": (lambda folder: (folder / CONFIG).write_text(""), "config.json is damaged"),
    "config nested deep": (lambda folder: (folder / CONFIG).write_text("[" * 200_000), "config.json is damaged"),
    "config too large": (lambda folder: os.truncate(folder / CONFIG, 2**24 + 1), "more than 16,777,216 bytes"),
    "config is a list": (lambda folder: (folder / CONFIG).write_text("[]"), "not from EqM/export.py"),
    "config of another program": (lambda folder: (folder / CONFIG).write_text('{"a": 1}'), "not from EqM/export.py"),
    "config of a later version": (change_json(format_version=2), "format_version is 2"),
    "a version that is True": (change_json(format_version=True), "format_version is True"),
    "config with another key": (change_json(more=1), "unknown key 'more'"),
    "config of a wrong type": (change_json(classes=3), "classes is 3"),
    "config of other channels": (change_json(network={"in_channels": 4}), "in_channels is 4"),
    "config of a huge network": (change_json(network={"num_classes": 2**31 - 1}), "another network"),
    "config is a pipe": (pipe(CONFIG), "cannot be read"),
    "weights are a pipe": (pipe(WEIGHTS), "cannot be read"),
    "weights are pickled": (pickled, "no .safetensors file"),
    "weights are empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "no .safetensors file"),
    "weights are cut": (lambda folder: os.truncate(folder / WEIGHTS, 5000), "cut short"),
    "weights with more bytes": (lambda folder: (folder / WEIGHTS).open("ab").write(b"more"), "no .safetensors file"),
    "a tensor is missing": (change_tensors(lambda tensors: tensors.pop(BIAS)), f"{BIAS} is nothing there"),
    "a tensor too many": (change_tensors(lambda tensors: tensors.update(w=torch.ones(1))), "w is (1,) there"),
    "a wrong shape": (change_tensors(lambda tensors: tensors.update({BIAS: torch.ones(17)})), f"{BIAS} is (17,) there"),
    "whole numbers": (change_tensors(lambda tensors: tensors.update({BIAS: torch.ones(16).long()})), "holds I64"),
    "8 bits": (
        change_tensors(lambda tensors: tensors.update({BIAS: torch.ones(16).to(torch.float8_e4m3fn)})),
        "holds F8_E4M3",
    ),
    "not finite": (change_tensors(lambda tensors: tensors[BIAS].fill_(torch.nan)), "not finite"),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_bad_folder_is_refused_in_one_line(exported, monkeypatch, spoil, words):
    monkeypatch.setattr(torch, "load", None)
    spoil(exported)
    with pytest.raises(UserError) as refused:
        load_network(exported)
    assert words in str(refused.value)
    assert str(exported) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 600


def test_wrong_shapes_are_refused_before_any_weight_is_read(exported, monkeypatch):
    change_tensors(lambda tensors: tensors.update({BIAS: torch.ones(17)}))(exported)
    monkeypatch.setattr("runs.exchange.network_weights", None)
    with pytest.raises(UserError, match="is \\(17,\\) there and \\(16,\\) here"):
        load_network(exported)


PLACES = {"ema": lambda w: {"ema": w, "model": {}}, "model": lambda w: {"model": w, "opt": {}}, "bare": lambda w: w}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("place", [*PLACES, "safetensors"])
def test_published_weights_load_under_all_their_names(tmp_path, monkeypatch, place, prefix):
    monkeypatch.setattr("runs.load_network.load_vae", lambda *_: SimpleNamespace(space=SPACE))
    weights = random_weights(NetworkSettings("tiny", 8, 4, num_classes=5))
    wrapped = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    path = tmp_path / ("w.safetensors" if place == "safetensors" else "w.pt")
    if place == "safetensors":
        save_file(wrapped, path)
    else:
        torch.save(PLACES[place](wrapped), path)
    loaded = load_network(path, vae="ema", model="tiny", image_size=16)
    assert same_weights(loaded, weights)
    assert (loaded.config.objective, loaded.network.uncond) == (Objective(), True)
    with pytest.raises(UserError, match="give --model, and --vae ema or mse"):
        load_network(path)


def test_published_sit_follows_its_velocity_from_noise_at_0_to_data_at_1(tmp_path, monkeypatch):
    monkeypatch.setattr("runs.load_network.load_vae", lambda *_: SimpleNamespace(space=SPACE))
    weights = random_weights(NetworkSettings("tiny", 8, 4, num_classes=5))
    torch.save(weights, tmp_path / "sit.pt")
    loaded = load_network(tmp_path / "sit.pt", vae="ema", model="tiny", image_size=16, published="sit")
    x, y, steps = Starts(3, (4, 8, 8))(range(2)), torch.tensor([0, 1]), 5
    for k in range(steps):
        x = x + loaded.network(x, torch.full((2,), k / steps), y) / steps
    torch.testing.assert_close(sampled(loaded, Method("euler", steps=steps)), x)
    export_flags = ["--ckpt", "sit.pt", "--published", "sit"]
    for flags, sampler in (([], "euler"), (["--sampler", "gd"], "gd")):
        monkeypatch.setattr(sys, "argv", ["sample_gd.py", *export_flags, *flags])
        assert sample_gd.method_of(sample_gd.parse_args(), loaded.config.objective).sampler == sampler


def test_published_says_nothing_of_weights_with_a_config(exported):
    with pytest.raises(UserError, match="--published is for weights without a config, and .*net has one"):
        load_network(exported, published="sit")
    with pytest.raises(UserError, match="no published 'dit': choose eqm, sit"):
        load_network(exported, published="dit")


def use_hub(port: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub on this machine, an empty cache, and a current folder in which nothing has the name of a network."""
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with one network, somebody/net; what it was asked for."""
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:  # noqa: N802
            asked.append(self.path)
            start = "/somebody/net/resolve/main/"
            file = exported / self.path.removeprefix(start)
            known = self.path.startswith(start) and file.is_file()
            contents = file.read_bytes() if known else b""
            self.send_response(200 if known else 404)
            for name, value in {"X-Repo-Commit": COMMIT, "ETag": f'"{file.name}"'}.items() if known else ():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(contents)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(contents)

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        use_hub(server.server_port, tmp_path, monkeypatch)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


def test_a_network_of_the_hub_is_downloaded_once_and_an_existing_path_wins(hub, exported, tmp_path):
    right = load_network(exported).network.state_dict()
    assert same_weights(load_network("somebody/net"), right)
    assert hub
    hub.clear()
    assert same_weights(load_network("somebody/net"), right)
    assert not hub, "the cache has it"
    with pytest.raises(UserError, match="there is no file or folder somebody/else, and the Hugging Face hub cannot"):
        load_network("somebody/else")
    (tmp_path / "somebody" / "net").mkdir(parents=True)
    with pytest.raises(UserError, match="somebody/net holds no exported network"):
        load_network("somebody/net")


@pytest.mark.parametrize("how", ["refuses", "never answers", "offline"])
def test_a_hub_that_cannot_be_reached_is_one_line_within_ten_seconds(tmp_path, monkeypatch, how):
    with socket.create_server(("127.0.0.1", 0)) as server:
        use_hub(server.getsockname()[1], tmp_path, monkeypatch)
        if how == "offline":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        elif how == "never answers":
            monkeypatch.setattr("runtime.hub.TIMEOUT_S", 0.2)
        else:
            server.close()
        start = time.monotonic()
        with pytest.raises(
            UserError, match="no file or folder a/b, and the Hugging Face hub cannot be reached"
        ) as said:
            load_network("a/b")
    assert time.monotonic() - start < 10
    assert len(str(said.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["results/0001.pt", "a/b.safetensors", "/a/b", "a", "a/b/c", "../b", "a/-b"])
def test_what_reads_like_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.setattr("runs.exchange.check_hub", None)
    monkeypatch.chdir(tmp_path)
    assert find_place(Path(name)) == Path(name)
    with pytest.raises(UserError):
        load_network(name)


def test_the_card_says_what_is_known(tmp_path):
    checkpoint, run = written(tmp_path), tmp_path / "run"
    (run / "samples").mkdir()
    for step in (20, 40, 60):
        write_png(run / "samples" / f"{step:07d}-sheet.png", torch.full((4, 4, 3), step).byte().numpy())
    rows = [{"step": 30, "loss": 9.0}, {"step": 40, "loss": 1.25, "held_out_loss": 1.5}, {"step": 50, "loss": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metric = {"metric": "Fréchet distance", "value": 12.5, "interval": [11, 14], "floor_left_out": "few"}
    comparison = {"title": "pixels", "dimensions": 64, "precision": "fp32", "equal_counts": 3, "metrics": [metric]}
    report = {"real": {"samples": 11}, "generated": {"samples": 7}, "comparisons": [comparison]}
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    export(checkpoint, tmp_path / "net", tmp_path / "evaluation.json")
    card = (tmp_path / "net" / CARD).read_text()
    for words in ("'shapes', 11 files, 2 classes: 'A', 'B'", "40 steps, 640 samples, bf16", "1.25 at step 40"):
        assert words in card
    for words in ("held out loss | 1.5 at", "12.5 [11, 14]", "7 samples, 11 real", "one frame in 2", "of step 40]"):
        assert words in card
    assert "secret" not in card
    assert (tmp_path / "net" / PICTURE).read_bytes() == (run / "samples" / "0000040-sheet.png").read_bytes()
    for wrong in ("[]", '{"comparisons": 3}', "{"):
        (tmp_path / "evaluation.json").write_text(wrong)
        with pytest.raises(UserError, match="no report of EqM/evaluate.py"):
            export(checkpoint, tmp_path / "net", tmp_path / "evaluation.json")
    assert (tmp_path / "net" / CARD).read_text() == card


def test_the_card_names_every_length_and_interval_of_the_training():
    assert clips_of(CONFIG_OF_RUN) == "clips of 4 frames of 16×16 pixels, one frame in 2, 12.5 a second"
    flags = CONFIG_OF_RUN.flags | {"clip_len": (4, 8, 16), "frame_interval": (2, 4)}
    mixed = clips_of(replace(CONFIG_OF_RUN, flags=flags))
    assert mixed == "clips of 4, 8 or 16 frames of 16×16 pixels, one frame in 2 or 4, 12.5 or 6.25 a second"


@pytest.mark.parametrize("name", [CONFIG, CARD, "notes.txt", ".git"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, name):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / name).write_text("theirs")
    with pytest.raises(UserError, match=f"net holds '{name}', and no exported network: name a new folder"):
        export(written(tmp_path), tmp_path / "net", None)
    assert [path.read_text() for path in (tmp_path / "net").iterdir()] == ["theirs"]


def test_an_export_is_whole_or_absent_and_replaces_only_an_export(exported, tmp_path, monkeypatch):
    checkpoint, before = tmp_path / "run" / "checkpoints" / "0000040.pt", (exported / WEIGHTS).stat().st_mtime_ns

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("export.card", full)
        for folder in (exported, tmp_path / "new"):
            with pytest.raises(UserError, match="cannot be written: No space left"):
                export(checkpoint, folder, None)
    with monkeypatch.context() as patch:  # between the two renames
        patch.setattr(Path, "rename", lambda self, to: full() if self.suffix == ".tmp" else os.rename(self, to))  # noqa: PTH104
        with pytest.raises(UserError, match="cannot be written: No space left"):
            export(checkpoint, exported, None)
    assert (exported / WEIGHTS).stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "net"}
    export(checkpoint, exported, None)
    assert (exported / WEIGHTS).stat().st_mtime_ns > before
    assert (exported / WEIGHTS).stat().st_mode == (exported / CONFIG).stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"run", "net"}
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(UserError, match="file cannot be written"):
        export(checkpoint, tmp_path / "file", None)
