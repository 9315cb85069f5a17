"""Fixtures: a small set of moving shapes, a trained checkpoint, and the scripts as people run them."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data.form import Form
from data.latent_space import LatentSpace
from data.packs.dataset import PackedSamples
from data.packs.format import Windows
from data.packs.pack import Pack, open_pack
from data.packs.packing import begin_pack, finish, missing_shards
from data.packs.plan import PackPlan, plan_pack
from data.packs.writer import pack_shard
from warm_python import FREE, WarmPython

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--video", "--clip-len", "4", "--image-size", "16", "--model", "EqM-Ti/4"]
WARM = WarmPython()

# In this process and in those that it starts: threads that share the work of small networks wait for one another, and
# on a machine that others use as well they wait ten times as long as they work.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# No test reads or writes the user's own indexes of files. The object lives as long as this process.
CACHE = tempfile.TemporaryDirectory(prefix="eqm-cache-")
os.environ["EQM_CACHE"] = CACHE.name
ENVIRONMENT = dict(os.environ)
PATIENCE_S = 300  # for a command that hangs; a machine with other work takes several times as long as an idle one


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escapes what is no text in a test's output, such as odd bytes of a name: reports go between processes."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


def environment_of(threads: int = 1, gpu: str = "") -> dict[str, str]:
    """This process's, without the launcher's variables of an outer run, for a CPU unless a GPU is named."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # OpenMP's threads spin while they wait for each other. Where other tests use their cores, that takes many minutes.
    waiting = {"OMP_WAIT_POLICY": "passive"} if threads > 1 else {}
    return environment | waiting | {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(threads)}


def run_command(
    *arguments: object, cwd: Path, threads: int = 1, timeout_s: float = PATIENCE_S, gpu: str = ""
) -> subprocess.CompletedProcess:
    """Runs a command to its end, without the launcher's variables of an outer run, on a CPU unless a GPU is named."""
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=environment_of(threads, gpu),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def run_python(script: str | Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Runs EqM/<script>, or one of a whole path, with plain python from its start."""
    return run_command(sys.executable, ROOT / "EqM" / script, *arguments, cwd=cwd)


def run_script(script: str | Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """As `run_python`, in a process that has imported torch already; warm_python.py says what that cannot show."""
    environment = environment_of()
    if not WARM.fits(environment):
        return run_python(script, *arguments, cwd=cwd)
    return WARM.run(ROOT / "EqM" / script, *arguments, cwd=cwd, environment=environment, timeout_s=PATIENCE_S)


def run_torchrun(processes: int, script: str | Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Runs EqM/<script>, or one of a whole path, under torchrun, on a port of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run_command(*launcher, ROOT / "EqM" / script, *arguments, cwd=cwd)


def run_ranks(processes: int, script: str | Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """As `run_torchrun`, but for the launcher: in processes that have imported torch already."""
    environment = environment_of()
    if not WARM.fits(environment):
        return run_torchrun(processes, script, *arguments, cwd=cwd)
    path = ROOT / "EqM" / script
    return WARM.run_ranks(processes, path, *arguments, cwd=cwd, environment=environment, timeout_s=PATIENCE_S)


def spawn(function: Callable[..., object], arguments: tuple, processes: int, folder: Path) -> None:
    """As torch.multiprocessing.spawn: calls a function of a test's module with a rank first, in several processes."""
    with (folder / "call.pickle").open("wb") as file:
        pickle.dump(sys.path, file)
        pickle.dump((function, arguments), file)
    run = run_ranks(processes, ROOT / "tests" / "rank_call.py", folder / "call.pickle", cwd=folder)
    assert run.returncode == 0, run.stderr


@pytest.fixture(autouse=True)
def environment_of_the_start() -> Iterator[None]:
    """Forgets what packages set when an earlier test first used them: no process but this one would have it.

    Ctrl-C ends the tests as before, though a command that ran in this process took it over.
    """
    for name in os.environ.keys() - ENVIRONMENT.keys() - FREE:
        del os.environ[name]
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in FREE})
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def draws_of_the_test(request: pytest.FixtureRequest) -> None:
    """Seeds torch by the test's name, for what the test draws without a generator of its own.

    So no draw depends on the tests before it in the same process. The seed is a large number, because tests give small
    ones to generators. Two generators with one seed draw numbers that depend on each other, even if one draws uniform
    and the other normal numbers.
    """
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session", autouse=True)
def end_of_warm_python() -> Iterator[None]:
    """Ends the server of warm processes."""
    yield
    WARM.close()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders of real .avi files: two shapes, two directions, four clips each."""
    folder = tmp_path_factory.mktemp("shapes")
    script = ROOT / "datasets" / "make_moving_shapes.py"
    options = "--shapes circle square --directions right up --train-clips 4 --test-clips 1 --size 32".split()
    result = run_command(sys.executable, script, folder, *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "train"


@pytest.fixture(scope="session")
def checkpoint(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four steps on the shapes."""
    folder = tmp_path_factory.mktemp("run")
    result = run_python("train.py", "--data-path", shapes, *SMALL, "--max-steps", 4, "--num-workers", 0, cwd=folder)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("results/000-EqM-Ti-4-Linear-velocity-None/checkpoints/0000004.pt")
    return path


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The training clips of the folder of real clips (train/ and test/) that EQM_REAL_CLIPS names."""
    if "EQM_REAL_CLIPS" not in os.environ:
        pytest.skip("EQM_REAL_CLIPS does not name a folder of real clips")
    return Path(os.environ["EQM_REAL_CLIPS"]) / "train"


class BlockMeans:
    """A stand-in for the VAE: the mean and the spread of 8×8 blocks, four channels."""

    space = LatentSpace("mean", "block means", scale=0.5, channels=4, downsampling=8)

    @staticmethod
    def encode_moments(frames: np.ndarray) -> np.ndarray:
        n, height, width, _ = frames.shape
        frames = np.ascontiguousarray(frames)  # sums round by the order in memory
        blocks = frames.reshape(n, height // 8, 8, width // 8, 8, 3).astype(np.float32) / 255
        means, spreads = blocks.mean((2, 4)), blocks.std((2, 4))  # (N, h, w, 3)
        moments = np.stack([means, spreads], axis=1)[..., [0, 1, 2, 0]]  # (N, 2, h, w, 4)
        return moments.transpose(0, 1, 4, 2, 3).astype(np.float16)


def begun(
    source: Path, folder: Path, form: Form, space: LatentSpace | None, windows: Windows | None = None
) -> PackPlan:
    """The plan of a pack whose folder has its settings. Tests share one process, so nothing is locked."""
    plan = plan_pack(source, folder, form, space, windows)
    folder.mkdir(parents=True, exist_ok=True)
    begin_pack(plan)
    return plan


def make_pack(source: Path, folder: Path, video: bool = True, image_size: int = 16, vae: object = None) -> Pack:
    """Packs in this process, and opens the pack."""
    plan = begun(source, folder, Form(video, image_size), vae and vae.space)
    for number in missing_shards(plan):
        pack_shard(plan, number, vae and vae.encode_moments, lambda items: None)
    finish(plan)
    return open_pack(folder, show_progress=False)


def item_frames(pack: Pack, index: int, flip: bool = False) -> np.ndarray:
    """All frames of an item, as training gathers them: (T, H, W, 3) uint8, or (T, 2, C, h, w) float16."""
    length = int(pack.lengths[index])
    samples = PackedSamples(pack, Form(pack.settings.video, pack.settings.image_size, clip_len=length), seed=0)
    return samples.gather(np.array([index]), np.arange(length)[None], np.array([flip]))[0]
