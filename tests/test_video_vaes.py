"""VAEs of every class that works here, small and made at random: their numbers, their clips, and the real commands."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import begun, run_script
from data.form import Form
from data.latent_space import LatentSpace, draw
from data.latents import VAE, load_vae
from data.packs.dataset import PackedSamples, unpack
from data.packs.format import Windows
from data.packs.latent_sums import LatentSums
from data.packs.pack import Pack, open_pack
from data.packs.packing import finish, missing_shards
from data.packs.writer import pack_shard, windows_of
from data.source import open_space
from data.video import probe_video, read_frames
from precision import Precision
from runs.config import check_resumable, config_of
from runs.load_network import CheckpointRequest, load_same_vae
from runtime.errors import UserError

diffusers = pytest.importorskip("diffusers")
CPU = torch.device("cpu")
MEANS, DEVIATIONS = [0.1, -0.2, 0.3, -0.4], [0.5, 1.0, 1.5, 2.0]
NUMBERS = {"latents_mean": MEANS, "latents_std": DEVIATIONS}
CAUSAL = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True]}
THREE, FOUR = (8, 8, 8), (8, 8, 8, 8)
KL = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
KL |= {"block_out_channels": [8, 16], "norm_num_groups": 4, "scaling_factor": 0.5}
TINY = {"encoder_block_out_channels": THREE, "decoder_block_out_channels": THREE}
TINY |= {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1), "scaling_factor": 2.0}
DC = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1)}
DC |= {"decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
DC |= {"latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.4}
LTX = {"latent_channels": 4, "block_out_channels": THREE, "decoder_block_out_channels": THREE}
LTX |= {"down_block_types": ("LTXVideoDownBlock3D",) * 3, "downsample_type": ("conv",) * 3, "patch_size": 1}
LTX |= {"layers_per_block": (1,) * 4, "decoder_layers_per_block": (1,) * 4, "scaling_factor": 0.5}
LTX |= {"spatio_temporal_scaling": (True, True, False), "decoder_spatio_temporal_scaling": (True, True, False)}
LTX |= {"decoder_inject_noise": (False,) * 4, "upsample_residual": (False,) * 3, "upsample_factor": (1,) * 3}
COSMOS = {"latent_channels": 4, "encoder_block_out_channels": FOUR, "decode_block_out_channels": FOUR, "num_layers": 1}
COSMOS |= {"attention_resolutions": (), "patch_size": 2, "spatial_compression_ratio": 4}
COSMOS |= {"temporal_compression_ratio": 4}
HUNYUAN = {"latent_channels": 4, "block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
HUNYUAN |= {"mid_block_add_attention": False, "scaling_factor": 0.5}
COG = {"block_out_channels": (4, 4, 4), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
COG |= {"down_block_types": ("CogVideoXDownBlock3D",) * 3, "up_block_types": ("CogVideoXUpBlock3D",) * 3}

# By name: the class, its settings, and how diffusers' pipelines of this class turn latents into what the network sees.
# Sources: its pipelines stable_diffusion_3 and _xl, sana, wan, qwenimage, ltx, cosmos, hunyuan_video and cogvideo.
VAES: dict[str, tuple[str, dict, Callable[[Tensor], Tensor]]] = {
    "kl with a shift": ("AutoencoderKL", KL | {"shift_factor": 0.3}, lambda z: (z - 0.3) * 0.5),
    "kl with statistics": (
        "AutoencoderKL",
        KL | NUMBERS,
        lambda z: (z - column(MEANS, z)) * 0.5 / column(DEVIATIONS, z),
    ),
    "tiny": ("AutoencoderTiny", TINY, lambda z: z * 2),
    "dc": ("AutoencoderDC", DC, lambda z: z * 0.4),
    "wan": (
        "AutoencoderKLWan",
        CAUSAL | NUMBERS | {"scale_factor_spatial": 4},
        lambda z: (z - column(MEANS, z)) * (1 / column(DEVIATIONS, z)),
    ),
    "qwen": ("AutoencoderKLQwenImage", CAUSAL | NUMBERS, lambda z: (z - column(MEANS, z)) / column(DEVIATIONS, z)),
    "ltx": ("AutoencoderKLLTXVideo", LTX, lambda z: (z - column(MEANS, z)) * 0.5 / column(DEVIATIONS, z)),
    "timed ltx": (
        "AutoencoderKLLTXVideo",
        LTX | {"timestep_conditioning": True},
        lambda z: (z - column(MEANS, z)) * 0.5 / column(DEVIATIONS, z),
    ),
    "cosmos": (
        "AutoencoderKLCosmos",
        COSMOS | NUMBERS,
        lambda z: (z - column(MEANS, z)) / column(DEVIATIONS, z),
    ),
    "cosmos by frame": (
        "AutoencoderKLCosmos",
        COSMOS | {"latents_mean": [0.1 * i for i in range(16)], "latents_std": [1.0] * 8 + [2.0] * 8},
        lambda z: (z - (0.1 * torch.arange(16)).view(4, 4, 1, 1)[:, : z.shape[2]]) / column([1, 1, 2, 2], z),
    ),
    "hunyuan": ("AutoencoderKLHunyuanVideo", HUNYUAN, lambda z: z * 0.5),
    "cogvideox": ("AutoencoderKLCogVideoX", COG, lambda z: z * 1.15258426),
}
TIMED = [name for name in VAES if name.split()[0] not in ("kl", "tiny", "dc")]


def column(values: list[float], z: Tensor) -> Tensor:
    return torch.tensor(values).view(-1, *[1] * (z.dim() - 2))


def make(name: str, folder: Path, **changed: object) -> Path:
    """Saves a VAE of the table, as diffusers does."""
    kind, settings, _ = VAES[name]
    torch.manual_seed(0)
    vae = getattr(diffusers, kind)(**settings | changed)
    if "ltx" in name:
        vae.latents_mean.copy_(torch.tensor(MEANS))
        vae.latents_std.copy_(torch.tensor(DEVIATIONS))
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VAE]:
    """Loads a VAE of the table by its name, from a folder that diffusers saved."""
    root = tmp_path_factory.mktemp("vaes")

    def load(name: str) -> VAE:
        folder = root / name.replace(" ", "-")
        return load_vae(str(folder if folder.is_dir() else make(name, folder)), CPU)

    return load


@pytest.mark.parametrize("name", VAES)
def test_what_the_network_sees_and_its_pixels_are_those_of_diffusers(vae_of, name):
    vae, (kind, _, seen) = vae_of(name), VAES[name]
    network = getattr(diffusers, kind).from_pretrained(vae.space.name).eval()
    frames = (9,) if name in TIMED else ()
    pixels = torch.rand(2, 3, *frames, 16, 16) * 2 - 1
    with torch.no_grad():
        found = network.encode(pixels, return_dict=False)[0]
        right = found if isinstance(found, Tensor) else found.mode()
        more = [torch.zeros(2)] if name == "timed ltx" else []
        back = network.decode(right, *more).sample
    moments = vae.moments(pixels)
    assert moments.shape == (2, 2, *right.shape[1:])
    assert moments.shape[2:] == (4, *map(vae.space.frames, frames), *[vae.space.size(16)] * 2)
    x = vae.space.normalised(moments[:, 0])
    torch.testing.assert_close(x, seen(right), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.decode(x), back, rtol=0, atol=1e-5)
    assert bool(moments[:, 1].any()) == (name.split()[0] not in ("tiny", "dc", "cosmos"))


@pytest.mark.parametrize("name", ["wan", "cosmos by frame"])
def test_a_video_vae_encodes_an_image_as_a_clip_of_one_frame(vae_of, name):
    vae, image = vae_of(name), torch.rand(2, 3, 16, 16) * 2 - 1
    moments = vae.moments(image)
    assert moments.shape == (2, 2, 4, 4, 4)
    assert torch.equal(moments, vae.moments(image[:, :, None])[:, :, :, 0])
    x = vae.space.normalised(moments[:, 0])
    assert torch.equal(x, vae.space.normalised(moments[:, 0][:, :, None])[:, :, 0])
    assert vae.decode(x).shape == image.shape


def test_clips_that_a_vae_does_not_take_are_an_error_in_one_line():
    space = LatentSpace("wan", "", 1.0, 2, 8, time_factor=4)
    assert [space.frames(length) for length in (1, 5, 81)] == [1, 2, 21]
    assert [space.clip_len(frames) for frames in (1, 2, 21)] == [1, 5, 81]
    with pytest.raises(UserError, match=r"^--clip-len 16: the VAE wan takes clips of 1 \+ 4·k frames: give 13 or 17$"):
        space.frames(16)
    by_frame = replace(space, means=(0.0, 1.0) * 3)
    assert by_frame.frames(9) == 3
    with pytest.raises(UserError, match="^--clip-len 13 is too long: the VAE knows clips up to 9 frames$"):
        by_frame.frames(13)


@pytest.mark.parametrize(
    ("name", "changed", "problem"),
    [
        ("kl with statistics", {"latents_std": None}, "do not go together"),
        ("kl with statistics", {"shift_factor": 0.1}, "do not go together"),
        ("kl with statistics", {"latents_mean": [0.0] * 3 + [1.0] * 2}, "has 5 means and 4 deviations for 4 channels"),
        ("kl with statistics", {"latents_std": [1.0, 1.0, 1.0, 0.0]}, r"deviations\[3\]"),
        ("kl with a shift", {"shift_factor": float("nan")}, r"means\[0\]"),
        ("ltx", {"decoder_inject_noise": [True] * 4}, "decodes with noise"),
        ("wan", {"scale_factor_spatial": 8}, "which its config.json contradicts: correct it"),
        ("wan", {"_class_name": "AutoencoderKLMagvit"}, "the classes that work here are AutoencoderKL, "),
    ],
)
def test_a_config_that_is_wrong_or_unknown_is_an_error_in_one_line(tmp_path, name, changed, problem):
    path = make(name, tmp_path / "vae") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UserError, match=problem) as raised:
        load_vae(str(path.parent), CPU).moments(torch.zeros(1, 3, 5, 16, 16))
    assert "\n" not in str(raised.value)


def test_files_of_versions_that_knew_no_shift_keep_their_meaning(vae_of):
    vae = vae_of("kl with a shift")
    plain = replace(vae.space, means=())
    assert plain.as_dict().keys() == {"name", "fingerprint", "scale", "channels", "downsampling"}
    assert vae.space.as_dict()["means"] == (0.3,) * 4
    loaded = load_same_vae(CheckpointRequest(Path("x.pt"), None, {}), replace(plain, name=vae.space.name), CPU, False)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        right = loaded.network.decode(x / 0.5).sample
    assert torch.equal(loaded.decode(x), right)
    assert not torch.equal(vae.decode(x), right)
    _, goes_on = open_space(None, vae.space.name, CPU, Precision("fp32", "fp32", torch.float32), plain)
    assert goes_on.space == plain


def packed(source: Path, folder: Path, vae: VAE, video: bool, windows: Windows | None = None) -> Pack:
    """Packs latents of 16×16 pixels in this process."""
    plan = begun(source, folder, Form(video, 16), vae.space, windows)
    for number in missing_shards(plan):
        pack_shard(plan, number, vae.encode_moments, lambda items: None)
    finish(plan)
    return open_pack(folder, show_progress=False)


def seen_by_training(pack: Pack, clip_len: int = 1) -> Tensor:
    """What the network sees of one clip of each item: (N, C, [t,] h, w)."""
    samples = PackedSamples(pack, Form(True, 16, clip_len), seed=0)
    batch = samples.__getitems__([(0, index) for index in range(len(pack))])
    moments = unpack(batch["x"], batch["flip"], video=True)
    return draw(moments, pack.settings.space, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["kl with a shift", "kl with statistics", "wan", "ltx", "cosmos"])
def test_statistics_that_packing_prints_bring_latents_to_mean_0_and_deviation_1(tmp_path, shapes, name):
    windows = Windows(9, 1, 2) if name in TIMED else None
    folder = make(name, tmp_path / "vae", **{"latents_std": [5.0] * 4} if name == "wan" else {})
    first = packed(shapes, tmp_path / "before", load_vae(str(folder), CPU), True, windows)
    lines = first.latent_report()
    assert "WARNING: channels" in lines[1]
    text = lines[3].strip().replace("latents_mean", '"means":').replace("latents_std", '"stds":')
    better = json.loads("{" + text + "}")

    if name == "ltx":
        network = diffusers.AutoencoderKLLTXVideo.from_pretrained(folder)
        network.latents_mean.copy_(torch.tensor(better["means"]))
        network.latents_std.copy_(torch.tensor(better["stds"]))
        network.save_pretrained(folder)
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"latents_mean": better["means"], "latents_std": better["stds"]}
        config |= {"shift_factor": None} if "shift_factor" in config else {}
        (folder / "config.json").write_text(json.dumps(config))
    vae = load_vae(str(folder), CPU)
    pack = packed(shapes, tmp_path / "after", vae, True, windows)
    assert len(pack.latent_report()) == 1
    x = seen_by_training(pack, 9 if windows else 4).transpose(0, 1).flatten(1)  # (C, …)
    assert x.mean(1).abs().max() < 0.1
    assert (x.std(1) - 1).abs().max() < 0.15


def test_latents_that_are_not_finite_are_an_error_and_leave_no_pack(tmp_path, shapes):
    space = LatentSpace("overflowing", "", 1.0, 1, 1)
    vae = SimpleNamespace(space=space, encode_moments=lambda x: np.full((len(x), 2, 1, 16, 16), np.inf, np.float16))
    with pytest.raises(UserError, match="^the VAE overflowing makes latents that are not finite: take another VAE$"):
        packed(shapes, tmp_path / "pack", vae, True)
    assert not list((tmp_path / "pack").glob("shard*"))


def test_sums_over_the_set_are_those_of_all_latents_with_their_spread():
    space = LatentSpace("", "", 0.5, 3, 1, means=(1.0, 2.0, 3.0), deviations=(1.0, 2.0, 4.0))
    moments = torch.rand(6, 2, 2, 3, 5, 5).half()
    mean, deviation = moments.float().flatten(0, 1).unbind(1)
    parts = [LatentSums.of(part.numpy(), space) for part in (moments[:1], moments[1:])]
    means, deviations = sum(parts, start=LatentSums()).moments()
    drawn = torch.stack([space.normalised(mean + deviation * torch.randn_like(mean)) for _ in range(400)])
    drawn = drawn.transpose(0, 2).flatten(1)
    np.testing.assert_allclose(means, drawn.mean(1), atol=0.01)
    np.testing.assert_allclose(deviations, drawn.std(1), rtol=0.02)


@pytest.mark.parametrize(
    ("count", "decoded", "windows", "starts"),
    [
        (20, 20, Windows(5, 2, 4), [0, 4, 7, 11]),
        (20, 20, Windows(5, 1, 1), [0]),
        (10, 10, Windows(5, 2, 4), [0, 1]),
        (3, 3, Windows(5, 1, 4), [0]),
        (20, 12, Windows(5, 2, 4), [0, 4, 7, 11]),
        (20, 2, Windows(5, 2, 4), [0]),
    ],
)
def test_windows_are_spread_from_the_first_frame_to_the_last(count, decoded, windows, starts):
    frames = [np.full((2, 2, 3), i, np.uint8) for i in range(decoded)]
    found = [window[:, 0, 0, 0].tolist() for window in windows_of(iter(frames), count, windows)]
    right = [[min(start + i * windows.frame_interval, decoded - 1) for i in range(5)] for start in starts]
    assert found == right


def test_a_pack_of_windows_holds_the_latents_of_the_files_and_of_their_mirrors(tmp_path, shapes, vae_of):
    vae, windows = vae_of("wan"), Windows(5, 2, 3)
    pack = packed(shapes, tmp_path / "pack", vae, True, windows)
    assert "4×2×4×4 latents" in pack.describe()
    assert set(pack.lengths) == {3}
    path, info = shapes / pack.paths[1], probe_video(shapes / pack.paths[1])
    right = {}
    for place in range(3):
        start = round(place * (len(info.times) - 9) / 2)
        frames = read_frames(path, info, range(start, start + 9, 2), 16)[None]  # (1, T, H, W, 3)
        for mirrored, shown in ((False, frames), (True, np.ascontiguousarray(frames[..., ::-1, :]))):
            right[place, mirrored] = vae.encode_moments(shown)
    samples, seen = PackedSamples(pack, Form(True, 16, 5, 2, flip=True), seed=3), set()
    for epoch in range(60):
        batch = samples.__getitems__([(epoch, 1)])
        assert batch["seconds_per_frame"].item() == pytest.approx(2 / info.frames_per_second)
        x = unpack(batch["x"], batch["flip"], True)  # (1, 2, C, t, h, w)
        (which,) = [key for key, moments in right.items() if np.allclose(x, moments, atol=1e-3)]
        seen.add(which)
    assert seen == right.keys()


@pytest.fixture(scope="module")
def video_run(vae_of, shapes, tmp_path_factory) -> Path:
    """A folder in which the commands packed clips through a video VAE, and trained on them."""
    folder = tmp_path_factory.mktemp("run")
    vae = vae_of("wan").space.name
    flags = [
        "--video",
        "--image-size",
        16,
        "--vae",
        vae,
        "--clip-len",
        9,
        "--frame-interval",
        1,
        "--windows",
        2,
        "--num-workers",
        1,
    ]
    run = run_script("prepare.py", shapes, "pack", *flags, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert "32 windows of 9 frames, 1 apart" in run.stdout
    assert "latents by channel: mean " in run.stdout
    run = run_script("train.py", "--data-path", "pack", "--video", "--model", "EqM-Ti/2", "--max-steps", 2, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder


def test_the_commands_train_on_windows_of_latents_and_sample_frames_at_the_rate_of_the_clips(video_run, shapes):
    (path,) = video_run.glob("results/*/checkpoints/0000002.pt")
    config = config_of(torch.load(path, weights_only=True)["config"], path)
    assert config.network.input_size == (3, 4, 4)
    assert (config.space.time_factor, config.form.clip_len, config.flags["clip_len"]) == (4, 9, 9)
    rate = probe_video(next(shapes.rglob("*.avi"))).frames_per_second
    assert config.frames_per_second == pytest.approx(rate)
    assert config.seconds_per_frame == pytest.approx(4 / rate)
    with pytest.raises(UserError, match="latents were scaled and shifted by other numbers"):
        check_resumable(config, replace(config, space=replace(config.space, means=())), path)
    flags = ["--num-fid-samples", 2, "--num-sampling-steps", 2, "--video", "--clip-len", 9]
    run = run_script("sample_gd.py", "--ckpt", path, *flags, cwd=video_run)
    assert run.returncode == 0, run.stderr
    info = probe_video(video_run / "samples" / "000001.mp4")
    assert len(info.times) == 9
    assert info.frames_per_second == pytest.approx(rate)


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("prepare.py", ["--clip-len", 8], "takes clips of 1 + 4·k frames: give 5 or 9"),
        pytest.param("prepare.py", [], "give --clip-len, such as 9, 13, 17", marks=pytest.mark.slow),
        ("train.py", ["--clip-len", 13], "pack was made with --clip-len 9, not 13: leave out --clip-len"),
        pytest.param("train.py", ["--frame-interval", 3], "--frame-interval 1, not 3", marks=pytest.mark.slow),
    ],
)
def test_clips_that_do_not_fit_the_vae_or_the_pack_are_an_error(
    video_run, vae_of, shapes, tmp_path, script, flags, said
):
    if script == "prepare.py":
        flags = [shapes, tmp_path / "new", "--video", "--image-size", 16, "--vae", vae_of("wan").space.name, *flags]
    else:
        flags = ["--data-path", "pack", "--video", "--model", "EqM-Ti/2", *flags]
    run = run_script(script, *flags, cwd=video_run)
    assert run.returncode == 1
    (line,) = run.stderr.strip().splitlines()
    assert said in line
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_windows_are_scored_and_started_from_and_a_run_without_a_pack_encodes_clips_whole(
    video_run, vae_of, shapes, tmp_path
):
    (path,) = video_run.glob("results/*/checkpoints/0000002.pt")
    scores = {}
    for source in (shapes, video_run / "pack"):
        run = run_script("score.py", "--ckpt", path, source, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        lines = (tmp_path / "scores.csv").read_text().splitlines()[1:]
        scores[source.name] = np.array([[float(value) for value in line.split(",")[-2:]] for line in lines])
    np.testing.assert_allclose(scores["pack"], scores["train"], rtol=0.01, atol=1e-5)  # packed in float16

    flags = ["--num-fid-samples", 2, "--num-sampling-steps", 1, "--init", shapes, "--init-noise", 0.01]
    run = run_script("sample_gd.py", "--ckpt", path, *flags, "--target-fps", 5, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    info = probe_video(tmp_path / "samples" / "000000.mp4")
    assert (len(info.times), info.frames_per_second) == (9, pytest.approx(5))

    flags = ["--video", "--image-size", 16, "--clip-len", 9, "--frame-interval", 1, "--model", "EqM-Ti/2"]
    flags += ["--vae", vae_of("wan").space.name, "--max-steps", 4, "--sample-every", 4, "--sample-steps", 1]
    run = run_script("train.py", "--data-path", shapes, *flags, "--ckpt", path, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (preview,) = tmp_path.glob("results/*/samples/0000004/000000.mp4")
    assert len(probe_video(preview).times) == 9
