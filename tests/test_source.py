"""Training from files and from packs, of pixels and of latents, as people run it."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from conftest import run_ranks, run_script
from data.batches import DeviceLoader

diffusers = pytest.importorskip("diffusers")
SMALL = ["--video", "--clip-len", "4", "--model", "EqM-Ti/4", "--log-every", 1, "--max-steps", 3, "--lr", 1e-3]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    folder = tmp_path_factory.mktemp("vae")
    vae = diffusers.AutoencoderKL(block_out_channels=[8, 16], norm_num_groups=4, **blocks)
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packs(shapes, vae_folder, tmp_path_factory) -> Path:
    """A folder with two packs of the shapes, `pixels` and `latents`."""
    folder = tmp_path_factory.mktemp("packs")
    for name, flags in (("pixels", []), ("latents", ["--vae", vae_folder])):
        run = run_script("prepare.py", shapes, folder / name, "--video", "--image-size", 16, *flags, cwd=folder)
        assert run.returncode == 0, run.stderr
    return folder


def losses(folder: Path) -> list[float]:
    (path,) = folder.glob("results/*/metrics.jsonl")
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("flags", "ranks"), [(["--num-workers", 2], 0), ([], 2)])
def test_files_and_a_pack_train_alike_with_any_number_of_workers_and_ranks(shapes, packs, tmp_path, flags, ranks):
    for name, data in (("files", [shapes, "--image-size", 16]), ("pack", [packs / "pixels"])):
        (tmp_path / name).mkdir()
        command = ["train.py", "--data-path", *data, *SMALL, *flags]
        cwd = tmp_path / name
        run = run_ranks(ranks, *command, cwd=cwd) if ranks else run_script(*command, cwd=cwd)
        assert run.returncode == 0, run.stderr
        assert ("a pack of pixels" in run.stdout) == (name == "pack")
    assert losses(tmp_path / "files") == losses(tmp_path / "pack")


def test_a_pack_of_latents_trains_and_its_checkpoint_samples(packs, vae_folder, tmp_path):
    run = run_script("train.py", "--data-path", packs / "latents", *SMALL, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "a pack of latents" in run.stdout
    (path,) = tmp_path.glob("results/*/checkpoints/0000003.pt")
    config = torch.load(path, weights_only=True)["config"]
    assert config["vae"]["name"] == str(vae_folder)
    assert config["vae"]["downsampling"] == 2
    assert config["network"]["input_size"] == (4, 8, 8)
    flags = ["--num-fid-samples", 1, "--num-sampling-steps", 2]
    run = run_script("sample_gd.py", "--ckpt", path, *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_packed_latents_and_latents_encoded_on_the_way_train_alike(shapes, packs, vae_folder, tmp_path):
    data = {"packed": [packs / "latents"], "encoded": [shapes, "--image-size", 16, "--vae", vae_folder]}
    for name, source in data.items():
        (tmp_path / name).mkdir()
        run = run_script("train.py", "--data-path", *source, *SMALL, "--no-flip", cwd=tmp_path / name)
        assert run.returncode == 0, run.stderr
    # A pack rounds means and deviations to 16 bits.
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "encoded"), rel=2e-3)


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("pixels", ["--video", "--image-size", 32], "was made with --image-size 16, not 32: leave out --image-size"),
        ("pixels", [], "is a pack of videos: add --video"),
        ("latents", ["--video", "--vae", "ema"], ", not ema: leave out --vae"),
        ("latents", ["--video", "--vae", "none"], ", not none: leave out --vae"),
    ],
)
def test_a_pack_of_another_form_than_asked_for_is_an_error(packs, tmp_path, name, flags, said):
    run = run_script("train.py", "--data-path", packs / name, "--clip-len", 4, *flags, cwd=tmp_path)
    assert run.returncode == 1
    (line,) = run.stderr.strip().splitlines()
    assert said in line


def test_metrics_have_the_share_of_time_spent_waiting_for_data(packs, tmp_path):
    run = run_script("train.py", "--data-path", packs / "pixels", *SMALL, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("results/*/metrics.jsonl")
    shares = [json.loads(line)["waiting_for_data"] for line in path.read_text().splitlines()]
    assert all(0 <= share < 1 for share in shares)


def slow_batch(samples: list[int]) -> dict:
    time.sleep(0.05)
    return {"x": torch.tensor(samples), "unreadable": [""]}


def test_waiting_for_data_is_told_from_work():
    loader = DeviceLoader(DataLoader(range(8), batch_size=2, collate_fn=slow_batch), torch.device("cpu"))
    seen = []
    for batch in loader:
        seen += batch["x"].tolist()
        time.sleep(0.1)
    assert seen == list(range(8))
    assert 4 * 0.05 <= loader.take_idle_seconds() < 0.5  # with the work it would be 0.6
    assert loader.take_idle_seconds() == 0
