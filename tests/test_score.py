"""EqM/score.py as people run it."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image

import score
from conftest import make_pack, run_python, run_ranks, run_script
from data.latents import to_unit_range
from data.video import probe_video, read_frames, write_video
from models import sample_energy
from network_settings import NetworkSettings
from runs.checkpoint import save_checkpoint
from runs.config import config_of
from runtime import distributed
from score import auroc, scores_at


@pytest.fixture(scope="module")
def lively_checkpoint(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with larger output and class weights, so that fields differ."""
    saved = torch.load(checkpoint, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, weight in saved["ema"].items():
        if name.startswith(("final_layer", "y_embedder")):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    path = tmp_path_factory.mktemp("lively") / "lively.pt"
    save_checkpoint(path, saved)
    return path


@pytest.fixture(scope="module")
def noise_folder(tmp_path_factory) -> Path:
    """A flat folder of three clips of noise."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for i in range(3):
        write_video(folder / f"{i:06d}.mp4", rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8), 25)
    return folder


def rows(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def numbers(path: Path) -> np.ndarray:
    return np.array([[float(row["norm"]), float(row["energy"])] for row in rows(path)])


def scored(
    checkpoint: Path,
    folder: Path,
    *arguments: object,
    processes: int = 0,
    start: Callable[..., CompletedProcess] = run_script,
) -> str:
    command = ["score.py", "--ckpt", checkpoint, *arguments]
    run = run_ranks(processes, *command, cwd=folder) if processes else start(*command, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def both(lively_checkpoint, shapes, noise_folder, tmp_path_factory) -> tuple[Path, str]:
    """Where the shapes and the noise are scored, and what was printed."""
    folder = tmp_path_factory.mktemp("scored")
    arguments = [shapes, noise_folder, "--global-batch-size", 5]
    return folder, scored(lively_checkpoint, folder, *arguments, start=run_python)


def by_hand(checkpoint: Path, clip: Path, label: int) -> list[float]:
    saved = torch.load(checkpoint, weights_only=True)
    network = config_of(saved["config"], checkpoint).network.build()
    network.load_state_dict(saved["ema"])
    frames = read_frames(clip, probe_video(clip), [0, 3, 6, 9], 16)
    x = to_unit_range(torch.from_numpy(frames).permute(3, 0, 1, 2))[None]
    with torch.no_grad():
        f = network(x, torch.zeros(1), torch.tensor([label]), 3 / 25)
    return [f.square().mean().sqrt().item(), -(x * f).mean().item()]


def test_each_files_norm_and_energy_are_those_of_the_unconditional_field_at_its_first_window(
    both, lively_checkpoint, shapes, noise_folder
):
    folder, _ = both
    table = rows(folder / "scores.csv")
    assert list(table[0]) == ["path", "file", "norm", "energy"]
    clips = sorted(shapes.glob("*/*.avi"))
    assert [row["file"] for row in table[:16]] == [str(clip.relative_to(shapes)) for clip in clips]
    assert [(row["path"], row["file"]) for row in table[16:]] == [
        (str(noise_folder), f"00000{i}.mp4") for i in range(3)
    ]
    found = numbers(folder / "scores.csv")
    for i, clip in ((0, clips[0]), (13, clips[13]), (17, noise_folder / "000001.mp4")):
        np.testing.assert_allclose(found[i], by_hand(lively_checkpoint, clip, 4), rtol=1e-4)


def test_two_paths_are_told_apart_by_the_area_under_their_curves_with_a_picture(both):
    folder, printed = both
    found = numbers(folder / "scores.csv")
    for i, name in enumerate(("norm", "energy")):
        assert f"AUROC of the {name}: {brute_force(found[:16, i], found[16:, i]):.4f}" in printed
    assert "(3) has a higher score than one of" in printed
    assert "(16)" in printed
    picture = np.asarray(Image.open(folder / "scores.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 4


def brute_force(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.mean([(b > a) + 0.5 * (b == a) for a in first for b in second]))


@pytest.mark.parametrize("values", [2, 5, 10**6])
def test_the_area_is_the_share_of_pairs_in_order_with_ties_as_halves(values):
    rng = np.random.default_rng(values)
    for sizes in ((1, 1), (7, 4), (30, 50)):
        first, second = (rng.integers(0, values, size).astype(float) for size in sizes)
        assert auroc(first, second) == pytest.approx(brute_force(first, second), abs=1e-12)
    assert auroc(np.zeros(3), np.ones(2)) == 1
    assert auroc(np.ones(3), np.zeros(2)) == 0
    assert auroc(np.ones(3), np.ones(2)) == 0.5


def test_norm_and_energy_of_a_known_field():
    def towards_two(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return 2 - x

    towards_two.energy = "none"
    x = torch.tensor([[2.0, 2.0], [1.0, 5.0]]).view(2, 2, 1, 1)
    found = scores_at(towards_two, x, torch.zeros(2).long(), torch.zeros(2))
    torch.testing.assert_close(found, torch.tensor([[0, 0], [5**0.5, -(1 * 1 - 5 * 3) / 2]]))


@torch.no_grad()
def test_a_network_that_was_trained_with_an_energy_is_scored_by_it():
    torch.manual_seed(0)
    network = NetworkSettings("EqM-Ti/4", (2, 8, 8), 3, 2, energy="l2").build().eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x, y, seconds = torch.randn(2, 3, 2, 8, 8), torch.tensor([0, 2]), torch.tensor([0.1, 0.2])
    found = scores_at(network, x, y, seconds)
    field = network(x, torch.ones(2), y, seconds)
    torch.testing.assert_close(found[:, 0], field.square().flatten(1).mean(1).sqrt())
    torch.testing.assert_close(found[:, 1], sample_energy(network, x, y, seconds))
    assert (found[:, 1] > 0).all(), "-E is half a square; read off the field it would be another number"


def test_a_pack_has_the_scores_of_its_files(both, lively_checkpoint, shapes, tmp_path):
    make_pack(shapes, tmp_path / "pack")
    scored(lively_checkpoint, tmp_path, tmp_path / "pack", "--output", "of/pack.csv")
    np.testing.assert_allclose(numbers(tmp_path / "of" / "pack.csv"), numbers(both[0] / "scores.csv")[:16], rtol=1e-5)
    assert not (tmp_path / "of" / "pack.png").exists()


def test_files_are_scored_under_their_own_class_or_one_that_is_named(lively_checkpoint, shapes, tmp_path):
    scored(lively_checkpoint, tmp_path, shapes, "--labels", "--output", "own.csv")
    scored(lively_checkpoint, tmp_path, shapes, "--class", "CircleUp", "--output", "named.csv")
    clip = sorted(shapes.glob("*/*.avi"))[9]
    np.testing.assert_allclose(numbers(tmp_path / "own.csv")[9], by_hand(lively_checkpoint, clip, 2), rtol=1e-4)
    np.testing.assert_allclose(numbers(tmp_path / "named.csv")[9], by_hand(lively_checkpoint, clip, 1), rtol=1e-4)


def test_scores_do_not_depend_on_the_number_of_processes(both, lively_checkpoint, shapes, tmp_path):
    scored(lively_checkpoint, tmp_path, shapes, "--global-batch-size", 4, processes=2)
    table, whole = rows(tmp_path / "scores.csv"), rows(both[0] / "scores.csv")[:16]
    assert [row["file"] for row in table] == [row["file"] for row in whole]
    np.testing.assert_allclose(numbers(tmp_path / "scores.csv"), numbers(both[0] / "scores.csv")[:16], rtol=1e-5)


def test_files_that_cannot_be_read_are_counted_with_a_reason(lively_checkpoint, noise_folder, tmp_path):
    shutil.copytree(noise_folder, tmp_path / "given")
    (tmp_path / "given" / "000001.mp4").write_text("no video")
    printed = scored(lively_checkpoint, tmp_path, "given")
    assert "WARNING 1 files in given cannot be read, for example 000001.mp4: " in printed
    assert "given: 2 files, mean norm" in printed
    assert [row["file"] for row in rows(tmp_path / "scores.csv")] == ["000000.mp4", "000002.mp4"]


def test_the_ranks_share_the_files(monkeypatch):
    class Unit(torch.nn.Module):
        is_video, device, energy = False, torch.device("cpu"), "none"

        def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(x)

    content = score.Content([str(i) for i in range(7)], [""] * 7, lambda i: (torch.full((3, 2, 2), i).byte(), 0.0))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found = {}
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        part, unreadable = score.score(content, [0] * 7, Unit(), None, 4, "files")
        assert unreadable == []
        assert len(part) == 4 - rank
        found |= part
    assert sorted(found) == list(range(7))
    assert found[5] == pytest.approx([1, 1 - 5 / 127.5], abs=1e-6)
