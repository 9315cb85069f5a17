"""Training and sampling in the latent space of a VAE: a small one, made at random and saved as diffusers does."""

import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, run_command, run_script
from data.file_list import Found
from data.form import Form
from data.latent_space import LatentSpace, draw
from data.latents import PUBLISHED, batch_moments, load_vae
from data.source import Source
from drawing.pictures import read_png
from network_settings import EqM_models
from precision import Precision
from runs.load_network import load_network
from runtime.errors import UserError

diffusers = pytest.importorskip("diffusers")
CPU = torch.device("cpu")
SMALL = ["--video", "--clip-len", "4", "--image-size", "16", "--model", "EqM-Ti/2", "--num-workers", "0"]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latent_run(vae_folder, shapes, tmp_path_factory) -> Path:
    """A folder in which a network was trained on latents of the shapes, encoded as they came."""
    folder = tmp_path_factory.mktemp("run")
    flags = [*SMALL, "--vae", vae_folder, "--max-steps", 3, "--log-every", 1]
    run = run_script("train.py", "--data-path", shapes, *flags, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder


def checkpoint(folder: Path) -> Path:
    (path,) = folder.glob("results/*/checkpoints/0000003.pt")
    return path


def test_a_saved_vae_gives_the_moments_of_diffusers_whatever_the_chunks(vae_folder, monkeypatch):
    vae = load_vae(str(vae_folder), CPU)
    assert (vae.space.channels, vae.space.downsampling, vae.space.scale) == (4, 2, 0.5)
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        right = diffusers.AutoencoderKL.from_pretrained(vae_folder).encode(pixels).latent_dist
    monkeypatch.setattr("data.latents.CHUNK_PIXELS", 2 * 16 * 16)
    moments = vae.moments(pixels)
    assert moments.shape == (5, 2, 4, 8, 8)
    torch.testing.assert_close(moments[:, 0], right.mean)
    torch.testing.assert_close(moments[:, 1], right.std)
    packed = vae.encode_moments(frames)
    assert packed.dtype == np.float16
    np.testing.assert_allclose(packed, moments.numpy(), atol=2e-3, rtol=2e-3)


def test_clips_are_encoded_and_decoded_frame_by_frame(vae_folder):
    vae = load_vae(str(vae_folder), CPU)
    clips = torch.randint(0, 256, (2, 3, 4, 16, 16), dtype=torch.uint8)
    moments = batch_moments(vae, clips)
    assert moments.shape == (2, 2, 4, 4, 8, 8)
    torch.testing.assert_close(moments[1, :, :, 3], batch_moments(vae, clips[1:, :, 3])[0])
    latents = torch.randn(2, 4, 4, 8, 8)
    pixels = vae.decode(latents)
    assert pixels.shape == (2, 3, 4, 16, 16)
    torch.testing.assert_close(pixels[1, :, 3], vae.decode(latents[1:, :, 3])[0])
    torch.testing.assert_close(pixels[0, :, 0], vae.network.decode(latents[:1, :, 0] / 0.5).sample[0])


def test_in_bf16_a_cast_copy_computes_and_what_comes_out_is_float32(vae_folder):
    exact, rounded = load_vae(str(vae_folder), CPU), load_vae(str(vae_folder), CPU, bf16=True)
    assert {weight.dtype for weight in rounded.network.parameters()} == {torch.bfloat16}
    pixels, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    for right, found in (
        (exact.moments(pixels), rounded.moments(pixels)),
        (exact.decode(latents), rounded.decode(latents)),
    ):
        assert found.dtype == torch.float32
        assert 1e-4 < ((right - found).norm() / right.norm()).item() < 0.1
    assert rounded.space == exact.space


def test_latents_are_drawn_from_the_posterior_and_scaled():
    moments = torch.stack([torch.full((1000, 4), 3.0), torch.full((1000, 4), 0.25)], dim=1).half()
    latents = draw(moments, LatentSpace("", "", 0.5, 4, 8), torch.Generator().manual_seed(0))
    assert latents.dtype == torch.float32
    assert latents.mean().item() == pytest.approx(1.5, abs=0.01)
    assert latents.std().item() == pytest.approx(0.125, abs=0.005)


def test_training_on_latents_is_kept_in_the_checkpoint_and_sampling_decodes_them(latent_run, vae_folder):
    config = torch.load(checkpoint(latent_run), weights_only=True)["config"]
    assert config["network"]["input_size"] == (4, 8, 8)
    assert config["network"]["in_channels"] == 4
    assert config["vae"]["name"] == str(vae_folder)
    assert config["vae"]["scale"] == 0.5
    flags = ["--num-fid-samples", 2, "--num-sampling-steps", 2, "--image-size", 16]
    run = run_script("sample_gd.py", "--ckpt", checkpoint(latent_run), *flags, cwd=latent_run)
    assert run.returncode == 0, run.stderr
    with av.open(str(latent_run / "samples" / "000001.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(16, 16, 3)] * 4


@pytest.mark.slow
def test_clips_start_samples_of_latents_and_are_scored_alike_from_files_and_packs(latent_run, shapes, tmp_path):
    path, quick = checkpoint(latent_run), ["--num-fid-samples", 2, "--num-sampling-steps", 1]
    flags = ["--init", shapes, "--init-noise", 0.01, "--cfg-scale", 2, "--cfg-channels", 3, "--compose", "0 + 1"]
    run = run_script("sample_gd.py", "--ckpt", path, *quick, *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2

    vae = torch.load(path, weights_only=True)["config"]["vae"]["name"]
    for name, kind in (("latents", ["--vae", vae]), ("pixels", [])):
        run = run_script("prepare.py", shapes, tmp_path / name, "--video", "--image-size", 16, *kind, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    scores = {}
    for source in (shapes, tmp_path / "latents", tmp_path / "pixels"):
        run = run_script("score.py", "--ckpt", path, source, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        lines = (tmp_path / "scores.csv").read_text().splitlines()[1:]
        scores[source.name] = np.array([[float(value) for value in line.split(",")[-2:]] for line in lines])
    assert scores["train"].shape == (16, 2)
    np.testing.assert_allclose(scores["pixels"], scores["train"], rtol=1e-5)
    np.testing.assert_allclose(scores["latents"], scores["train"], rtol=0.01, atol=1e-5)  # packed in float16


@pytest.mark.parametrize("name", ["none", "another"])
def test_samples_of_latents_are_not_decoded_by_another_vae(latent_run, tmp_path, name):
    if name == "another":
        torch.manual_seed(1)
        diffusers.AutoencoderKL(block_out_channels=[32], latent_channels=4).save_pretrained(tmp_path / name)
    run = run_script("sample_gd.py", "--ckpt", checkpoint(latent_run), "--vae", name, cwd=tmp_path)
    assert run.returncode == 1
    (line,) = run.stderr.strip().splitlines()
    assert "trained on" in line


def test_a_run_on_latents_does_not_go_on_with_pixels(latent_run, shapes, tmp_path):
    flags = [*SMALL, "--vae", "none", "--max-steps", 5, "--ckpt", checkpoint(latent_run)]
    run = run_script("train.py", "--data-path", shapes, *flags, cwd=tmp_path)
    assert run.returncode == 1
    assert "was trained with input_size (4, 8, 8), and this run has (4, 16, 16)" in run.stderr


@pytest.mark.parametrize("bare", [False, True])
def test_a_published_image_checkpoint_samples_with_a_vae(vae_folder, tmp_path, bare):
    torch.manual_seed(0)
    network = EqM_models["EqM-Ti/2"](input_size=8, in_channels=4, num_classes=3)
    weights = network.state_dict()
    torch.save(weights if bare else {"model": weights, "ema": weights, "opt": {}}, tmp_path / "published.pt")
    flags = ["--ckpt", "published.pt", "--num-fid-samples", 3, "--num-sampling-steps", 2, "--cfg-scale", 1.5]
    command = ["sample_gd.py", *flags, "--model", "EqM-Ti/2", "--image-size", 16]
    run = run_script(*command, "--vae", vae_folder, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (3, 16, 16, 3)
    assert Image.open(tmp_path / "samples" / "000002.png").size == (16, 16)
    loaded = load_network(tmp_path / "published.pt", vae=str(vae_folder), model="EqM-Ti/2", image_size=16)
    assert torch.equal(loaded.network.state_dict()["pos_embed"], weights["pos_embed"])
    assert (loaded.classes, loaded.vae.space) == (["0", "1", "2"], load_vae(str(vae_folder), CPU).space)
    for flags in ([], ["--vae", "none"]):
        assert "has no config" in (said := run_script(*command, *flags, cwd=tmp_path).stderr)
        assert "to sample a published one, give --model, and --vae ema or mse" in said


def test_without_diffusers_or_weights_one_line_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="neither none, ema nor mse, nor a folder"):
        load_vae("sd-vae", CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="give a folder with its weights as --vae DIR"):
        load_vae(str(tmp_path / "empty"), CPU)
    hidden = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'EqM')!r}); sys.argv[0] = 'train.py'\n"
        "sys.modules['diffusers'] = None\n"
        "import train; from runtime import cli; cli.run(train.main, '')"
    )
    flags = ["--data-path", tmp_path, "--vae", "ema"]
    run = run_command(sys.executable, "-c", hidden, *flags, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.strip() == "train.py: error: --vae needs diffusers: pip install -r requirements-latent.txt"


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "never answers"])
def test_a_hub_that_cannot_be_reached_is_named_within_ten_seconds(monkeypatch, silent):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setitem(PUBLISHED, "ema", "nobody/a-vae-that-no-cache-has")
        if silent:
            monkeypatch.setattr("runtime.hub.TIMEOUT_S", 0.2)
        else:
            server.close()
        start = time.monotonic()
        with pytest.raises(UserError, match="the Hugging Face hub cannot be reached.*give its folder as --vae DIR$"):
            load_vae("ema", CPU)
    assert time.monotonic() - start < 10


def test_an_image_size_that_the_vae_does_not_divide_is_an_error(vae_folder, shapes, tmp_path):
    flags = ["--video", "--clip-len", 4, "--image-size", 17, "--vae", vae_folder]
    run = run_script("train.py", "--data-path", shapes, *flags, cwd=tmp_path)
    assert run.returncode == 1
    assert "--image-size 17 is not a multiple of the VAE's 2 pixels" in run.stderr


def test_a_run_on_packed_latents_decodes_what_it_samples(vae_folder, shapes, tmp_path):
    run = run_script(
        "prepare.py", shapes, tmp_path / "pack", "--video", "--image-size", 16, "--vae", vae_folder, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    settings = ["--lr", 0.01, "--sample-steps", 4, "--sample-stepsize", 0.3]
    flags = [*SMALL[:-4], "--model", "EqM-Ti/2", "--max-steps", 3, "--sample-every", 3, *settings]
    run = run_script("train.py", "--data-path", tmp_path / "pack", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    sampler = ["--num-sampling-steps", 4, "--stepsize", 0.3, "--global-batch-size", 8]
    run = run_script("sample_gd.py", "--ckpt", checkpoint(tmp_path), "--folder", "samples", *sampler, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (sheet,) = tmp_path.glob("results/*/samples/0000003-sheet.png")
    assert np.array_equal(read_png(sheet), read_png(tmp_path / "samples-sheet.png"))


def test_another_vae_than_the_packs_decodes_nothing(vae_folder):
    space = replace(load_vae(str(vae_folder), CPU).space, fingerprint="another")
    pack = SimpleNamespace(folder="pack")
    source = Source(Form(False, 16), Found.of_items("", (), []), pack, space, None)
    with pytest.raises(UserError, match="pack was made with other weights of the VAE"):
        source.decoder(CPU, Precision("fp32", "fp32", torch.float32))
