"""The page beside the samples: as text, and in a headless Chromium where there is one."""

import base64
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from browser import CHROMIUM, Browser
from conftest import run_script
from data.file_list import Item
from data.form import Form
from data.video import probe_video, write_video
from drawing.page import Card, Picture, page
from runtime.errors import UserError
from sampling import pages
from sampling.holding import Kept
from sampling.method import Method
from sampling.outputs import Output, SampleLog
from sampling.pages import write_page
from sampling.plan import Plan
from sampling.starts import Starts

CRUEL = "<script>window.broken = 1</script>\"'><img src=x onerror='window.broken = 1'>\u202e"
FRAMES = 8
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")


class Elements(HTMLParser):
    """The elements of a page: names and attributes, and its texts."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def all(self, *tags: str) -> list[dict]:
        return [attributes for tag, attributes in self.found if tag in tags]


def clip(seed: int, side: int = 16) -> np.ndarray:
    """Bright blocks, (T, side, side, 3) uint8, another picture in each frame."""
    small = np.random.default_rng(seed).integers(64, 256, (FRAMES, side // 4, side // 4, 3), np.uint8)
    return small.repeat(4, axis=1).repeat(4, axis=2)


def sampled(
    folder: Path, count: int, suffix: str = ".mp4", start: Path | None = None, kept_frames: int = 0
) -> tuple[Output, Plan, SampleLog]:
    """Samples as EqM/sample_gd.py leaves them, with a class whose name is markup."""
    output, log = Output(folder, suffix, None if suffix == ".png" else 4.0), SampleLog()
    folder.mkdir(exist_ok=True)
    for i in range(count):
        frames = clip(i)[: 1 if suffix == ".png" else None]
        output.write(i, frames)
        log.descents[i] = 30 + i, 0.1
        log.shown[i] = frames
    items = (Item(str(start), 0, probe_video(start)),) if start else ()
    kept = Kept(torch.ones(1, FRAMES, 16, 16).bool(), True, kept_frames) if kept_frames else None
    starts = Starts(7, (3, FRAMES, 16, 16), items, Form(True, 16, FRAMES), kept=kept)
    return output, Plan([0, 1], [], starts, (CRUEL, "Plain", "no class")), log


def read(output: Output, plan: Plan, log: SampleLog) -> tuple[str, Elements]:
    path = write_page(output, plan, Method(), log)
    assert path == output.folder.with_name(output.folder.name + ".html")
    return path.read_text(), Elements(path.read_text())


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "sources").mkdir()
    write_video(tmp_path / "sources" / "a<b>.mp4", clip(99), 4.0)
    return tmp_path / "sources" / "a<b>.mp4"


def test_a_page_holds_each_sample_with_its_class_index_seed_and_evaluations(tmp_path):
    output, plan, log = sampled(tmp_path / "out", 3)
    text, elements = read(output, plan, log)
    videos = elements.all("video")
    assert [base64.b64decode(video["data-src"]) for video in videos] == [output.path(i).read_bytes() for i in range(3)]
    assert {video["data-type"] for video in videos} == {"video/mp4"}
    assert all(video.keys() >= {"muted", "loop", "playsinline"} and "src" not in video for video in videos)
    assert [line for line in elements.texts if "evaluations" in line] == [
        f"{i} · seed 7 · {30 + i} evaluations" for i in range(3)
    ]
    assert "The files are inside this page: it can be sent alone." in elements.texts
    assert "Plain" in elements.texts
    assert "data-given" not in text.split("<script>")[0]


def test_names_from_outside_are_text_and_no_markup(tmp_path, source):
    text, elements = read(*sampled(tmp_path / "out<i>", 2, start=source))
    assert len(elements.all("script")) == 1
    assert not elements.all("i", "img")
    assert CRUEL.replace("\u202e", "\\u202e") in "".join(elements.texts)
    assert any("from a<b>.mp4" in line for line in elements.texts)
    assert "\u202e" not in text


def test_nothing_of_a_page_lies_on_another_machine(tmp_path, source):
    text, elements = read(*sampled(tmp_path / "out", 2, start=source))
    assert not re.search(r"https?:|//[a-z]", text.split("<main")[0] + text.split("</main>")[1])
    policies = [each["content"] for each in elements.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert not elements.all("link", "iframe", "a")


def test_files_beyond_the_limit_are_named_by_paths_beside_the_page(tmp_path, monkeypatch, source):
    output, plan, log = sampled(tmp_path / "out ü#?", 3, start=source)
    start = len(source.read_bytes())
    monkeypatch.setattr(pages, "EMBEDDED_BYTES", 2 * start + 200)
    text, elements = read(output, plan, log)
    assert [video["data-src"] for video in elements.all("video") if "data-type" not in video] == [
        f"./out%20%C3%BC%23%3F/{i:06d}.mp4" for i in range(3)
    ]
    inside = [video for video in elements.all("video") if "data-type" in video]
    assert 1 <= len(inside) < 3
    assert "The files are in out ü#?, beside this page: keep both together." in elements.texts
    assert f"What a sample started from stands to its left, for {len(inside)} of 3 samples." in elements.texts


def test_a_page_shows_what_a_sample_started_from_and_marks_the_frames_that_were_given(tmp_path, source):
    _, elements = read(*sampled(tmp_path / "out", 2, start=source, kept_frames=2))
    videos = elements.all("video")
    assert [video["title"] for video in videos] == ["the source", "the sample"] * 2
    assert videos[0]["data-src"] == videos[2]["data-src"]
    assert [video.get("data-given") for video in videos] == [None, "0.25"] * 2
    assert "--share: 25.00%" in elements.all("main")[0]["style"]
    assert sum(each.get("class") == "bar" for each in elements.all("div")) == 2
    assert "The first 2 frames were given: their border and bar are coloured." in elements.texts


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "image/png"), (".gif", "image/gif")])
def test_images_and_gifs_are_images_on_the_page(tmp_path, suffix, kind):
    output, plan, log = sampled(tmp_path / "out", 2, suffix)
    _, elements = read(output, plan, log)
    assert [image["data-type"] for image in elements.all("img")] == [kind] * 2
    assert base64.b64decode(elements.all("img")[1]["data-src"]) == output.path(1).read_bytes()


def test_a_page_shows_only_the_first_of_very_many_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PAGE_SAMPLES", 2)
    _, elements = read(*sampled(tmp_path / "out", 3))
    assert len(elements.all("video")) == 2
    assert "The first 2 of 3 samples. The files are inside this page: it can be sent alone." in elements.texts


def test_a_source_that_is_gone_is_one_line(tmp_path, source):
    written = sampled(tmp_path / "out", 2, start=source)
    source.unlink()
    with pytest.raises(UserError, match="--init: .* cannot be read"):
        read(*written)


def test_the_sampler_writes_a_page_and_removes_that_of_earlier_samples(checkpoint, shapes, tmp_path):
    (tmp_path / "out.html").write_text("old")
    flags = ["--ckpt", checkpoint, "--num-fid-samples", 3, "--num-sampling-steps", 2, "--init", shapes]
    run = run_script("sample_gd.py", *flags, "--folder", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"page: {tmp_path / 'out.html'}" in run.stdout
    elements = Elements((tmp_path / "out.html").read_text())
    assert len(elements.all("video")) == 6
    assert "2 · seed 0 · 2 evaluations · from v_CircleRight_g01_c03.avi" in elements.texts
    Output(tmp_path / "out", ".mp4", 8.0).prepare(3)
    assert not (tmp_path / "out.html").exists()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def becomes_true(browser: Browser, script: str, seconds: float = 60) -> bool:
    """Whether an expression becomes true in this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if browser.value(script):
            return True
        time.sleep(0.1)
    return False


PLAYING = "[...document.querySelectorAll('video[src]')].filter(v => v.videoWidth == 16 && v.played.length)"


@needs_chromium
def test_in_a_browser_videos_play_and_given_frames_are_marked(browser, tmp_path, source):
    output, plan, log = sampled(tmp_path / "out", 4, start=source, kept_frames=6)
    browser.open(write_page(output, plan, Method(), log).as_uri())
    assert becomes_true(browser, f"{PLAYING}.length == 8 && {PLAYING}.every(v => v.currentTime > 0 && !v.paused)")
    # The first six of eight frames: the border comes and goes.
    assert becomes_true(browser, "document.querySelectorAll('figure.given').length > 0")
    assert becomes_true(browser, "document.querySelectorAll('figure.given').length < 4")
    assert browser.value("window.broken") is None
    assert all(address.startswith(("file:", "blob:")) for address in browser.asked_for())
    browser.screenshot(tmp_path / "shot.png")
    left, top, right, bottom = browser.value(
        "(r => [r.left + 4, r.top + 4, r.right - 4, r.bottom - 4])"
        "(document.querySelectorAll('video')[1].getBoundingClientRect())"
    )
    seen = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB").crop((left, top, right, bottom)))
    assert seen.mean() > 100  # blocks of 64 to 255; a video that does not show is black or the grey behind it
    assert seen.std() > 20


@needs_chromium
def test_in_a_browser_only_the_videos_near_the_window_are_loaded(browser, tmp_path):
    output, plan, log = sampled(tmp_path / "out", 1)
    picture = Picture("video/mp4", output.path(0).read_bytes())
    text = page("many", [], [Card(f"{i}", "", picture) for i in range(1000)], (16, 16), [])
    (tmp_path / "many.html").write_text(text)
    browser.open((tmp_path / "many.html").as_uri())
    first, last = (f"document.querySelectorAll('video')[{i}]" for i in (0, 999))
    assert becomes_true(browser, f"{first}.currentTime > 0 && !{first}.paused")
    assert browser.value("document.querySelectorAll('video[src]').length") < 100
    assert browser.value(f"{last}.hasAttribute('src')") is False
    browser.value("scrollTo(0, document.body.scrollHeight)")
    assert becomes_true(browser, f"{last}.currentTime > 0 && !{last}.paused && !{first}.hasAttribute('src')")
    assert browser.value(f"{first}.paused")
    assert browser.value("document.querySelectorAll('video[src]').length") < 100


@needs_chromium
def test_in_a_browser_files_beside_the_page_play_and_no_other_script_runs(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "EMBEDDED_BYTES", 10)
    output, plan, log = sampled(tmp_path / "out ü#?", 2)
    path = write_page(output, plan, Method(), log)
    path.write_text(path.read_text().replace("<footer>", "<footer><script>window.broken = 1</script>"))
    browser.open(path.as_uri())
    assert becomes_true(browser, f"{PLAYING}.length == 2")
    assert browser.value("window.broken") is None


@needs_chromium
def test_in_a_browser_images_show(browser, tmp_path):
    output, plan, log = sampled(tmp_path / "out", 2, ".png")
    browser.open(write_page(output, plan, Method(), log).as_uri())
    assert becomes_true(browser, "[...document.querySelectorAll('img')].every(i => i.naturalWidth == 16)")
