"""Clips a second of the loader: decoded from files, and from packs of pixels and of latents."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from data.batches import EpochStream, make_loader
from data.form import Form
from data.source import find_pack, open_source

WIDTH, HEIGHT, FRAMES, RATE = 320, 240, 50, 25  # of the source videos: MPEG-4 in AVI, like UCF-101
CLIP_LEN, FRAME_INTERVAL = 4, 3
WORKERS, BATCH = 2, 64
WARMUP_BATCHES = 4
SECONDS = 3.0  # for each rate


def write_sources(folder: Path, videos: int) -> None:
    """Writes videos of a drifting pattern into two class folders."""
    rng = np.random.default_rng(0)
    for i in range(videos):
        path = folder / f"class{i % 2}" / f"{i}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for t in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * t, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def write_vae(folder: Path) -> bool:
    """Writes a small random VAE with the latent shapes of Stable Diffusion's VAE. Returns False without diffusers."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        return False
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    AutoencoderKL(block_out_channels=[4] * 4, layers_per_block=1, norm_num_groups=2, **blocks).save_pretrained(folder)
    return True


def clips_per_second(data: Path, image_size: int, workers: int) -> float:
    """Clips a second from a folder of videos or a pack, once the workers have started."""
    form, pack = Form(True, image_size, CLIP_LEN, FRAME_INTERVAL, flip=True), find_pack(data)
    source = open_source(data, form, pack, pack.settings.space if pack else None, None)
    stream = EpochStream(len(source.found), BATCH, 10**6, seed=0, first=0, rank=0, ranks=1)
    batches = iter(make_loader(source.dataset(seed=0), stream, workers, pin_memory=False))
    for _ in range(WARMUP_BATCHES):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - start)


def loader_rates(videos: int = 8) -> Iterator[tuple[str, float]]:
    """Yields (name, clips a second), each as soon as it is measured."""
    prepare = Path(__file__).resolve().parents[1] / "prepare.py"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder / "videos", videos)
        yield f"decoding, 64 px, {WORKERS} workers", clips_per_second(folder / "videos", 64, WORKERS)
        packs = [("pixel pack, 64 px", 64, [])]
        if write_vae(folder / "vae"):
            packs.append(("latent pack, 32×32×4", 256, ["--vae", folder / "vae"]))
        for title, size, flags in packs:
            pack = folder / f"pack{size}"
            command = [sys.executable, prepare, folder / "videos", pack, "--video", "--image-size", size, *flags]
            subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
            for workers in (0, WORKERS):
                yield f"{title}, {workers} workers", clips_per_second(pack, size, workers)
