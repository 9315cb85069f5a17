"""Pictures that are not square, from files and packs to training, samples, evaluation and exports."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import run_script
from data.clips import read_image
from data.contents import npz_content, resized
from data.form import Form
from data.inputs.entries import Frames
from data.latents import load_vae
from data.packs.format import FORMAT, VERSION, Settings
from data.packs.pack import read_pack
from data.packs.writer import read_source
from data.video import probe_video, read_frames, write_video
from drawing.pictures import contact_sheet, read_png
from evaluation.features import pixel_features
from evaluation.judge import small, train_judge
from models import EqM
from network_settings import EqM_models, NetworkSettings
from positions import sincos_positions
from precision import Precision
from runs.checkpoint import save_checkpoint
from runs.config import Config
from runs.init_weights import start_from
from runs.load_network import load_network
from runs.resume import Asked, has_settings
from runtime.errors import UserError
from runtime.size import Size, covering, parse_size, plain, read_size, sides
from test_frames import MATRICES, with_matrix
from test_latents import vae_folder  # noqa: F401
from test_train import assert_same, load, metrics

HEIGHT, WIDTH = 48, 80  # of the files
SIZE = Size(24, 40)
CLIPS = ["--video", "--clip-len", 4, "--frame-interval", 1, "--temporal-patch", 2]
SMALL = ["--model", "EqM-Ti/8", "--num-workers", 0, "--global-batch-size", 4, "--log-every", 1, "--lr", 1e-3]
SHORT = ["--num-sampling-steps", 2, "--num-fid-samples", 3]


def chart(height: int, width: int, blue: int = 0) -> np.ndarray:
    """A picture (H, W, 3) whose red says how far to the right a pixel is, and whose green how far down."""
    down, right = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    return np.stack([right, down, np.full_like(right, blue)], axis=-1).round().astype(np.uint8)


def clip_of(number: int, mirrored: bool) -> np.ndarray:
    """Frames (T, H, W, 3) of a chart on which a bright block moves."""
    frames = np.repeat(chart(HEIGHT, WIDTH, 40 * number)[None], 8, axis=0)
    for i, frame in enumerate(frames):
        frame[10:26, 6 + 6 * i : 20 + 6 * i] = 255
    return frames[:, :, ::-1].copy() if mirrored else frames


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A folder of videos and one of images, two classes of five files each, 48 pixels high and 80 wide."""
    folder = tmp_path_factory.mktemp("wide")
    for kind in ("clips", "images"):
        for label in ("ToLeft", "ToRight"):
            (folder / kind / label).mkdir(parents=True)
            for i in range(5):
                frames = clip_of(i, label == "ToLeft")
                if kind == "clips":
                    write_video(folder / kind / label / f"{i}.mkv", frames, 10, lossless=True)
                else:
                    Image.fromarray(frames[0]).save(folder / kind / label / f"{i}.png")
    return folder


def done(script: str, *arguments: object, cwd: Path) -> str:
    run = run_script(script, *arguments, cwd=cwd)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def refused(script: str, *arguments: object, cwd: Path) -> str:
    run = run_script(script, *arguments, cwd=cwd)
    assert run.returncode, run.stdout
    assert run.stderr.count("\n") == 1, run.stderr
    return run.stderr


@pytest.fixture(scope="module")
def pack(wide, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    done("prepare.py", wide / "clips", folder / "pack", "--video", "--image-size", "24x40", cwd=folder)
    return folder / "pack"


@pytest.fixture(scope="module")
def run(wide, tmp_path_factory) -> Path:
    """The folder of a run on the videos, of four steps, with samples at the end."""
    folder = tmp_path_factory.mktemp("run")
    data = ["--data-path", wide / "clips", "--image-size", "24x40", *CLIPS, *SMALL]
    done("train.py", *data, "--max-steps", 4, "--sample-every", 4, "--sample-steps", 2, cwd=folder)
    return next(folder.glob("results/*"))


def checkpoint_of(run: Path) -> Path:
    return max(run.glob("checkpoints/*.pt"))


# Sizes


def test_a_size_is_read_written_and_spelt_in_one_way():
    for text, size in (("64", 64), ("64x64", 64), ("64x96", Size(64, 96)), ("96x64", Size(96, 64))):
        assert parse_size(text) == size
        assert read_size(plain(size)) == size
        assert parse_size(str(size)) == size
    assert sides(Size(64, 96)) == (64, 96)
    for value in ("64", "64x64", 0, True, 64.0, [64, 96], None, "64x0", "16385x1", 16385):
        with pytest.raises(ValueError, match="it is not a side from 1"):
            read_size(value)


def test_a_picture_just_covers_its_size_and_squares_stay_as_they_were():
    rng = np.random.default_rng(0)
    for height, width, wanted_height, wanted_width in rng.integers(1, 400, (500, 4)).tolist():
        found = covering(height, width, Size(wanted_height, wanted_width))
        assert found[0] >= wanted_height
        assert found[1] >= wanted_width
        assert found[0] == wanted_height or found[1] == wanted_width
        short = min(height, width)
        before = [wanted_height if side == short else int(wanted_height * side / short) for side in (height, width)]
        assert list(covering(height, width, wanted_height)) == before


# Reading


def in_memory(pixels: np.ndarray, size: int | Size) -> Tensor:
    """What a pack takes of an image (H, W, 3), or of the first frame of a clip (T, H, W, 3): (3, H, W)."""
    settings = Settings(FORMAT, VERSION, "", pixels.ndim == 4, size, "pixels", {}, ["A"], 1, 0)
    return torch.from_numpy(next(read_source(Frames(pixels, 10.0), settings)[1])).movedim(-1, 0)


def assert_shows_the_centre(x: Tensor, height: int, width: int) -> None:
    """A sample (3, [T,] H, W) of a chart of this height and width shows its centre, as large as can be."""
    frame = (x if x.dim() == 3 else x[:, 0]).float() / 255
    scale = max(frame.shape[1] / height, frame.shape[2] / width)
    for place, (shown, whole) in enumerate(zip(frame.shape[1:], (height, width), strict=True)):
        half = shown / scale / whole / 2
        along = frame[1 - place].mean(1 - place)  # green goes down, red to the right
        assert float(along[0]) == pytest.approx(0.5 - half, abs=1.5 / shown)
        assert float(along[-1]) == pytest.approx(0.5 + half, abs=1.5 / shown)


@pytest.mark.parametrize("size", [SIZE, Size(40, 24), Size(16, 160), 24, Size(100, 90)], ids=str)
@pytest.mark.parametrize(("height", "width"), [(48, 80), (80, 48), (30, 30)])
def test_files_arrays_and_turned_pictures_show_the_centre_at_the_size_asked_for(tmp_path, size, height, width):
    picture, form = chart(height, width), Form(False, size)
    Image.fromarray(picture).save(tmp_path / "a.png")
    on_its_side = Image.fromarray(picture).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x112] = 6  # turn it back by 90 degrees, clockwise
    on_its_side.save(tmp_path / "turned.png", exif=exif)
    write_video(tmp_path / "a.mkv", picture[None], 10, lossless=True)
    np.savez(tmp_path / "a.npz", picture[None])
    info = probe_video(tmp_path / "a.mkv")
    samples = [
        read_image(str(tmp_path / "a.png"), size),
        read_image(str(tmp_path / "turned.png"), size),
        npz_content(tmp_path / "a.npz", form).read(0)[0],
        torch.from_numpy(read_frames(tmp_path / "a.mkv", info, [0], size)[0]).movedim(-1, 0),
        in_memory(picture, size),
        in_memory(picture[None], size),
    ]
    for x in samples:
        assert x.shape == (3, *sides(size))
        assert_shows_the_centre(x, height, width)
    assert torch.equal(resized(samples[0], size), samples[0])


def test_a_video_on_its_side_is_turned_before_it_is_cropped(tmp_path):
    matrix, store = MATRICES["to be turned clockwise"]
    write_video(tmp_path / "a.mp4", np.ascontiguousarray(store(chart(HEIGHT, WIDTH)))[None], 10)
    path = with_matrix(tmp_path / "a.mp4", matrix)
    frame = torch.from_numpy(read_frames(path, probe_video(path), [0], Size(40, 24))[0]).movedim(-1, 0)
    assert_shows_the_centre(frame, HEIGHT, WIDTH)


# Networks


def test_rows_and_columns_of_a_network_are_those_of_its_input():
    network = EqM((16, 24), 8, 3, hidden_size=32, depth=1, num_heads=2, num_classes=2)
    assert network.grid == (1, 2, 3)
    assert network.input_shape == (3, 16, 24)
    assert torch.equal(network.pos_embed[0], sincos_positions(32, 2, 3))
    x = torch.randn(1, 3, 16, 24)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(1, 6, 8 * 8, 3)  # row by row
    doubled = torch.cat([patches, patches], dim=-1)
    assert torch.equal(network.unpatchify(doubled, network.grid)[:, :, 0], x)
    assert network(x, torch.zeros(1), torch.zeros(1).long()).shape == x.shape


@pytest.fixture
def tiny(monkeypatch) -> NetworkSettings:
    monkeypatch.setitem(EqM_models, "tiny", partial(EqM, patch_size=8, hidden_size=8, depth=1, num_heads=1))
    return NetworkSettings("tiny", 32, 3, num_classes=2)


def test_positions_of_another_shape_with_as_many_patches_are_not_taken(tmp_path, tiny):
    """An image of 32 × 32 has as many patches as one of 16 × 64."""
    config = Config(tiny, ("A", "B"), None, {"name": "fp32"})
    long = replace(config, network=replace(tiny, input_size=(16, 64)))
    for before, ours in ((config, long), (long, config), (long, long)):
        weights = {name: torch.randn(tensor.shape) for name, tensor in before.network.build().state_dict().items()}
        training = dict.fromkeys(("opt", "scaler", "step", "skipped", "epoch", "samples", "since_log", "bad_steps"))
        save_checkpoint(tmp_path / "a.pt", {"model": {}, "ema": weights, "config": before.as_dict(), **training})
        network = ours.network.build()
        own = network.pos_embed.clone()
        notes = start_from(network, ours, tmp_path / "a.pt")
        assert torch.equal(network.pos_embed, weights["pos_embed"] if before == ours else own)
        assert any("positions were not loaded" in note for note in notes) == (before != ours)
    network = long.network.build()
    torch.save({"ema": weights}, tmp_path / "published.pt")
    own = network.pos_embed.clone()
    start_from(network, long, tmp_path / "published.pt")
    assert torch.equal(network.pos_embed, own)


def test_published_weights_are_refused_for_images_that_are_not_square(vae_folder, tmp_path):  # noqa: F811
    network = EqM_models["EqM-Ti/2"](input_size=8, in_channels=4, num_classes=3)
    torch.save({"ema": network.state_dict()}, tmp_path / "published.pt")
    given = {"model": "EqM-Ti/2", "vae": str(vae_folder)}
    assert load_network(tmp_path / "published.pt", **given, image_size=16).network.grid == (1, 4, 4)
    with pytest.raises(UserError, match="--image-size 8x32: published networks take square images"):
        load_network(tmp_path / "published.pt", **given, image_size=Size(8, 32))


# Packs and training


def test_a_pack_says_its_size_and_a_square_one_is_the_same_however_it_was_asked_for(wide, pack, tmp_path):
    settings = json.loads((pack / "settings.json").read_text())
    assert settings["image_size"] == "24x40"
    assert read_pack(pack).settings.frame_shape == (24, 40, 3)
    assert "--image-size 24x40" in read_pack(pack).settings.command(pack)
    assert "a pack of 24×40 pixels" in done("check_data.py", pack, cwd=tmp_path)
    for name, size in (("number", "24"), ("pair", "24x24")):
        done("prepare.py", wide / "images", tmp_path / name, "--image-size", size, cwd=tmp_path)
    for path in sorted((tmp_path / "number").iterdir()):
        if path.name == "settings.json":
            assert path.read_bytes() == (tmp_path / "pair" / path.name).read_bytes()
            assert b'"image_size": 24,' in path.read_bytes()
        if path.suffix == ".bin":
            assert path.read_bytes() == (tmp_path / "pair" / path.name).read_bytes()


def test_training_from_a_pack_is_that_from_files_and_goes_on_bitwise(wide, pack, run, tmp_path):
    (tmp_path / "packed").mkdir()
    flags = [*CLIPS, *SMALL, "--max-steps", 4]
    done("train.py", "--data-path", pack, *flags, cwd=tmp_path / "packed")
    (packed,) = tmp_path.glob("packed/results/*")
    assert_same(load(packed, 4)["ema"], load(run, 4)["ema"])
    assert [row["loss"] for row in metrics(packed)] == [row["loss"] for row in metrics(run)]
    config = load(run, 4)["config"]
    assert (config["network"]["input_size"], config["args"]["image_size"]) == ((4, 24, 40), "24x40")

    # In two parts, the second of which takes the size from the checkpoint.
    data = ["--data-path", wide / "clips", *CLIPS, *SMALL]
    done("train.py", *data, "--image-size", "24x40", "--max-steps", 2, cwd=tmp_path)
    printed = done("train.py", *data, "--resume", "--max-steps", 4, cwd=tmp_path)
    assert "going on from" in printed
    assert "--image-size was" not in printed
    assert_same(load(next(tmp_path.glob("results/000*")), 4)["ema"], load(run, 4)["ema"])
    for size in (SIZE, Size(40, 24), 24):
        assert has_settings(run, Asked(tmp_path, True, None, {"image_size": size})) == (size == SIZE)
    wrong = refused("train.py", *data, "--ckpt", checkpoint_of(run), "--image-size", "40x24", cwd=tmp_path)
    assert "input_size (4, 24, 40), and this run has (4, 40, 24)" in wrong


def test_samples_previews_and_sheets_have_the_size_of_the_network(wide, run, tmp_path):
    flags = ["--ckpt", checkpoint_of(run), *SHORT, "--image-size", "24x40"]
    done("sample_gd.py", *flags, "--folder", "samples", cwd=tmp_path)
    for path in [*tmp_path.glob("samples/*.mp4"), *run.glob("samples/*/*.mp4")]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.height, stream.width) == (24, 40)
    strip = contact_sheet([np.zeros((4, 24, 40, 3), np.uint8)] * 3, ["a"] * 3)
    assert read_png(tmp_path / "samples-sheet.png").shape == strip.shape
    assert strip.shape[1] > 4 * 80
    assert len(list(run.glob("samples/*-sheet.png"))) == 1
    start = ["--init", wide / "clips", "--init-noise", 0.01, "--folder", "started"]
    done("sample_gd.py", *flags, *start, cwd=tmp_path)
    first = next(iter(sorted(tmp_path.glob("started/*.mp4"))))
    frame = torch.from_numpy(read_frames(first, probe_video(first), [0], SIZE)[0]).float().movedim(-1, 0)
    given = torch.from_numpy(clip_of(0, mirrored=True)[:1]).movedim(-1, 1).float()  # (1, 3, H, W)
    assert (frame - torch.nn.functional.avg_pool2d(given, 2)[0]).abs().mean() < 12
    done("score.py", "--ckpt", checkpoint_of(run), wide / "clips", cwd=tmp_path)
    wrong = refused("sample_gd.py", "--ckpt", checkpoint_of(run), "--image-size", "40x24", cwd=tmp_path)
    assert "--image-size 40x24 contradicts the checkpoint, which was trained with 24x40" in wrong


def test_images_train_sample_and_compare(wide, tmp_path):
    data = ["--data-path", wide / "images", "--image-size", "24x40"]
    done("train.py", *data, *SMALL, "--max-steps", 2, cwd=tmp_path)
    (run,) = tmp_path.glob("results/*")
    done("sample_gd.py", "--ckpt", checkpoint_of(run), *SHORT, "--num-fid-samples", 6, cwd=tmp_path)
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (6, 24, 40, 3)
    assert read_png(tmp_path / "samples" / "000000.png").shape == (24, 40, 3)
    printed = done("evaluate.py", wide / "images", "samples.npz", cwd=tmp_path)
    assert "compared as 24×40 pixels" in printed
    assert "--image-size 24x40" not in printed


def test_an_export_keeps_the_size(run, tmp_path):
    done("export.py", checkpoint_of(run), "exported", cwd=tmp_path)
    assert "clips of 4 frames of 24×40 pixels" in (tmp_path / "exported" / "README.md").read_text()
    loaded, trained = load_network(tmp_path / "exported"), load_network(checkpoint_of(run))
    assert loaded.config.form.image_size == SIZE
    assert loaded.network.input_shape == (3, 4, 24, 40)
    assert_same(loaded.network.state_dict(), trained.network.state_dict())


def test_latents_have_height_and_width_of_their_own(wide, vae_folder, tmp_path):  # noqa: F811
    vae = load_vae(str(vae_folder), torch.device("cpu"))
    assert vae.space.size(SIZE) == Size(12, 20)
    with pytest.raises(UserError, match="--image-size 24x41 is not a multiple of the VAE's 2 pixels"):
        vae.space.size(Size(24, 41))
    size = ["--image-size", "24x40", "--vae", vae_folder]
    done("prepare.py", wide / "clips", tmp_path / "pack", "--video", *size, cwd=tmp_path)
    settings = read_pack(tmp_path / "pack").settings
    assert settings.vae["side"] == "12x20"
    assert settings.frame_shape == (2, 2, 4, 12, 20)
    assert settings.space == vae.space
    done("train.py", "--data-path", "pack", *CLIPS, *SMALL, "--model", "EqM-Ti/4", "--max-steps", 2, cwd=tmp_path)
    (run,) = tmp_path.glob("results/*")
    assert load(run, 2)["config"]["network"]["input_size"] == (4, 12, 20)
    done("sample_gd.py", "--ckpt", checkpoint_of(run), *SHORT, "--image-size", "24x40", cwd=tmp_path)
    with av.open(str(tmp_path / "samples" / "000000.mp4")) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == (24, 40)


@pytest.mark.slow
def test_latents_of_files_are_those_of_a_pack(wide, vae_folder, tmp_path):  # noqa: F811
    size, model = ["--image-size", "24x40", "--vae", vae_folder], ["--model", "EqM-Ti/4", "--max-steps", 2]
    done("prepare.py", wide / "clips", "pack", "--video", *size, cwd=tmp_path)
    for name, data in (("files", [wide / "clips", *size]), ("packed", [tmp_path / "pack"])):
        (tmp_path / name).mkdir()
        done("train.py", "--data-path", *data, *CLIPS, *SMALL, *model, "--no-flip", cwd=tmp_path / name)
    files, packed = (
        [row["loss"] for row in metrics(next(tmp_path.glob(f"{name}/results/*")))] for name in ("files", "packed")
    )
    assert files == pytest.approx(packed, rel=1e-3)  # a pack has float16


# Evaluation


@pytest.fixture(scope="module")
def samples(wide, tmp_path_factory) -> Path:
    """The videos as EqM/sample_gd.py would write them, 24 × 40."""
    folder = tmp_path_factory.mktemp("of") / "samples"
    folder.mkdir()
    rows = ["file,index,class,class_name"]
    for i, path in enumerate(sorted(wide.glob("clips/*/*.mkv"))):
        frames = read_frames(path, probe_video(path), range(4), SIZE)
        write_video(folder / f"{i:06d}.mp4", frames, 10)
        rows.append(f"{i:06d}.mp4,{i},0,{path.parent.name}")
    (folder / "samples.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.slow
def test_judge_of_the_command_learns_clips_that_are_not_square(wide, samples, tmp_path):
    printed = done("evaluate.py", wide / "clips", samples, "--judge", cwd=tmp_path)
    assert "compared as 4 frames of 24×40 pixels" in printed
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["judge"]["generated"]["direction"]["share"] > 0.8


def test_a_judge_takes_clips_that_are_not_square(monkeypatch):
    monkeypatch.setattr("evaluation.judge.STEPS", 30)
    clips = torch.stack([torch.from_numpy(clip_of(i % 8, i >= 8)) for i in range(16)]).movedim(-1, 1)  # (N, 3, T, H, W)
    classes, fp32 = ["A"] * 8 + ["B"] * 8, Precision("fp32", "fp32", torch.float32)
    judge = train_judge(small(clips), classes, 0, torch.device("cpu"), fp32)
    assert judge.judge(small(clips), classes).shares()["class"] > 0.8


def test_evaluation_keeps_height_and_width(wide, pack, samples, tmp_path):
    clips = wide / "clips"
    printed = done("evaluate.py", clips, samples, cwd=tmp_path)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["compared"]["side"] == "24x40"
    assert (report["real"]["first_file"]["side"], report["generated"]["first_file"]["side"]) == ("48x80", "24x40")
    assert "compared as 4 frames of 24×40 pixels" in printed
    assert "enlarged" not in printed
    wrong = refused("evaluate.py", pack, samples, "--image-size", "40x24", cwd=tmp_path)
    assert "a pack of 24×40 pixels" in wrong
    assert "takes videos of 40×24 pixels" in wrong
    printed = done("evaluate.py", clips, samples, "--image-size", "20x60", cwd=tmp_path)
    assert "samples holds files of 40x24 pixels, which are enlarged to 20×60" in printed
    assert "clips holds" not in printed
    assert json.loads((tmp_path / "evaluation.json").read_text())["settings"]["image_size"] == "20x60"


def test_features_sheets_and_the_judge_see_pictures_in_their_proportions():
    clip = torch.from_numpy(chart(64, 96)).permute(2, 0, 1)[None, :, None]  # (1, 3, 1, H, W)
    assert small(clip).shape == (1, 3, 1, 32, 48)
    assert_shows_the_centre(small(clip)[0], 64, 96)
    assert small(clip[..., :20, :]).shape == (1, 3, 1, 20, 96)
    # 128 × 256 pixels are averaged down to 32 × 64: blocks of 4 × 4.
    blocks = torch.randint(0, 256, (2, 3, 2, 32, 64), dtype=torch.uint8)
    fine = blocks.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)
    torch.testing.assert_close(pixel_features(fine), pixel_features(blocks))
    assert contact_sheet([np.zeros((1, 24, 40, 3), np.uint8)], [""]).shape == (48 + 8 + 16 + 8, 80 + 2 + 16, 3)
    assert contact_sheet([np.zeros((1, 40, 24, 3), np.uint8)], [""]).shape == (80 + 8 + 16 + 8, 48 + 2 + 16, 3)


# Other commands, and wrong sizes


def test_corruptions_and_plans_take_a_size(wide, tmp_path):
    done("make_corruptions.py", wide / "clips", "spoiled", "--image-size", "24x40", cwd=tmp_path)
    for path in tmp_path.glob("spoiled/*/*/0.mkv"):
        with av.open(str(path)) as container:
            assert (container.streams.video[0].height, container.streams.video[0].width) == (24, 40)
    plan = ["plan_run.py", wide / "images", "--model", "EqM-Ti/8", "--batch", 2, "--image-size"]
    assert f"{10 * 24 * 40 * 3 / 1e9:,.3g} GB" in done(*plan, "24x40", cwd=tmp_path)
    wrong = refused(*plan, "24x36", cwd=tmp_path)
    assert "image size 24x36 is not a multiple of the patch size 8" in wrong


@pytest.mark.parametrize("size", ["0x5", "64x", "x64", "64x96x3", "64,96", "64x99999", ""])
def test_wrong_sizes_are_one_line_everywhere(tmp_path, size):
    commands = [("train.py", "--data-path", "gone"), ("sample_gd.py", "--ckpt", "gone"), ("prepare.py", "gone", "pack")]
    commands += [("evaluate.py", "gone", "too"), ("make_corruptions.py", "gone", "new"), ("plan_run.py", "gone")]
    for script, *flags in commands if size == "0x5" else commands[:1]:
        said = refused(script, *flags, "--image-size", size, cwd=tmp_path)
        assert f"argument --image-size: {size!r} is not a side from 1 to 16384, or a height and a width" in said


def test_sizes_that_patches_do_not_divide_are_both_named(tmp_path):
    for size in ("18x40", "40x18"):
        flags = ["--data-path", "gone", *CLIPS, *SMALL, "--image-size", size]
        assert f"image size {size} is not a multiple of the patch size 8" in refused("train.py", *flags, cwd=tmp_path)
