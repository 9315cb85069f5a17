"""A page of samples for a browser: one HTML file that opens from disk and needs no server.

A card's videos are loaded and played only while the card is near the window, so that a thousand stay smooth. Every
text is escaped. Beyond that, the page's policy (Content-Security-Policy, W3C) lets no other script run, and nothing be
asked from another machine.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runtime.errors import shown

LEAST_WIDTH = 128  # pixels; smaller pictures are magnified by whole numbers

STYLE = """
:root { color-scheme: light dark; --mark: #e8a200 }
body { background: Canvas; color: CanvasText; font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem }
h1 { font-size: 1.2rem; margin: 0 }
header, footer { max-width: 60rem; overflow-wrap: anywhere }
main { display: grid; gap: 1rem; margin: 1.5rem 0; grid-template-columns: repeat(auto-fill, minmax(var(--card), 1fr)) }
figure { margin: 0; content-visibility: auto; contain-intrinsic-size: auto calc(var(--high) + 4rem) }
.row { display: flex; gap: 4px }
.row > * { border: 3px solid transparent; width: var(--wide); height: var(--high); image-rendering: pixelated;
  background: #8884; background-clip: content-box; min-width: 0;
  object-fit: contain }
.given .row > * { border-color: var(--mark) }
.bar { position: relative; height: 5px; margin: 2px 3px; max-width: calc(var(--wide) * var(--pictures) + 10px);
  background: linear-gradient(to right, var(--mark) var(--share), #8886 var(--share)) }
.bar i { position: absolute; left: calc(var(--at, 0) * 100%); width: 2px; top: -2px; bottom: -2px;
  background: CanvasText }
figcaption { overflow-wrap: anywhere; padding: 0 3px }
figcaption span { display: block; opacity: 0.7; font-size: 12px }
"""

SCRIPT = """
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
const near = new Set();

function address(data) {
  if (!data.type) return data.src;
  const bytes = Uint8Array.from(atob(data.src), letter => letter.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], {type: data.type}));
}

function start(media) {
  media.src = address(media.dataset);
  if (media.tagName !== "VIDEO") return;
  media.controls = calm;
  if (!calm) media.play().catch(error => { media.controls = error.name === "NotAllowedError"; });
}

function stop(media) {
  if (media.tagName === "VIDEO") media.pause();
  URL.revokeObjectURL(media.src);
  media.removeAttribute("src");
  if (media.tagName === "VIDEO") media.load();
}

const observer = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    if (isIntersecting === near.has(target)) continue;
    isIntersecting ? near.add(target) : near.delete(target);
    target.querySelectorAll("[data-src]").forEach(isIntersecting ? start : stop);
  }
}, {rootMargin: "25%"});
document.querySelectorAll("figure").forEach(figure => observer.observe(figure));

function mark() {
  for (const figure of near) {
    const video = figure.querySelector("[data-given]");
    if (!video || !video.duration) continue;
    const at = video.currentTime / video.duration;
    figure.style.setProperty("--at", at);
    figure.classList.toggle("given", at < video.dataset.given);
  }
  requestAnimationFrame(mark);
}
if (document.querySelector("video[data-given]")) mark();
"""


@dataclass(frozen=True)
class Picture:
    """A video or an image: its bytes, which the page then holds, or its address relative to the page.

    Attributes:
        type: as browsers call it (MIME), such as "video/mp4".
        source: the bytes, or the address, in which every special letter is escaped by %.
    """

    type: str
    source: bytes | str


@dataclass(frozen=True)
class Card:
    """One sample: its class, a line about it, its picture, and what it started from, if it did."""

    caption: str
    facts: str
    picture: Picture
    start: Picture | None = None


def escaped(text: str) -> str:
    """A text from anywhere for HTML, in one line, in an attribute too."""
    return html.escape(shown(text))


def media(picture: Picture, title: str, given: float) -> str:
    """The element that plays a picture. The script gives it its source.

    Args:
        given: the share of its frames that was given.
    """
    inside = isinstance(picture.source, bytes)
    source = base64.b64encode(picture.source).decode() if inside else picture.source
    about = f'title="{title}"' + (f' data-given="{given:.6g}"' if given else "")
    about += f' data-type="{picture.type}"' if inside else ""
    if picture.type.startswith("video/"):
        return f'<video muted loop playsinline {about} data-src="{escaped(source)}"></video>'
    return f'<img alt="" {about} data-src="{escaped(source)}">'


def figure(card: Card, given: float) -> str:
    """The HTML of a card."""
    pictures = [media(card.start, "the source", 0.0)] if card.start else []
    pictures.append(media(card.picture, "the sample", given))
    bar = f'<div class="bar" style="--pictures: {len(pictures)}"><i></i></div>' if given else ""
    caption = f"<figcaption><b>{escaped(card.caption)}</b><span>{escaped(card.facts)}</span></figcaption>"
    return f'<figure><div class="row">{"".join(pictures)}</div>{bar}{caption}</figure>'


def page(
    title: str,
    facts: Sequence[str],
    cards: Iterable[Card],
    size: tuple[int, int],
    notes: Sequence[str],
    given: float = 0.0,
) -> str:
    """The HTML of a whole page.

    Args:
        facts: lines under the title.
        size: height and width of every picture, in pixels.
        notes: lines at the end.
        given: the share of the frames of every video that was given; those are marked.
    """
    figures = [(card.start is not None, figure(card, given)) for card in cards]
    zoom = max(1, -(-LEAST_WIDTH // size[1]))
    high, wide = zoom * size[0], zoom * size[1]
    across = (2 if any(pair for pair, _ in figures) else 1) * (wide + 10)
    layout = f"--high: {high}px; --wide: {wide}px; --share: {given:.2%}; --card: min({across}px, 100%)"
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';"
        " img-src blob: file: 'self'; media-src blob: file: 'self'"
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>",
            f"<header><h1>{escaped(title)}</h1>{paragraphs(facts)}</header>",
            "<noscript><p>The pictures need JavaScript.</p></noscript>",
            f'<main style="{layout}">',
            *(text for _, text in figures),
            f"</main>\n<footer>{paragraphs(notes)}</footer>\n<script>{SCRIPT}</script>\n</html>\n",
        ]
    )


def paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escaped(line)}</p>" for line in lines)
