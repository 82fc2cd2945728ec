"""Headless Chromium: what a page measures once it is laid out, and a picture of it. No driver, no package."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATH = next((found for name in NAMES if (found := shutil.which(name))), None)
MISSING = "no Chromium on this machine: apt-get install chromium"
SECONDS = 120

# Appended to a copy of the page: it measures what is laid out and leaves that in the document for --dump-dom.
MEASURE = """<script>
addEventListener("load", () => {
  const wide = document.documentElement.clientWidth, over = [];
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (box.right > wide + 0.5 || box.left < -0.5) over.push(e.tagName + "." + e.getAttribute("class"));
    // Elements of a drawing do not scroll; what they reach over is asked of their boxes below.
    if (e.ownerSVGElement || getComputedStyle(e).display == "inline") continue;
    if (e.clientWidth && e.scrollWidth > e.clientWidth + 1)
      over.push("inside " + e.tagName + "." + e.getAttribute("class"));
  }
  const of = (s, root = document) => [...root.querySelectorAll(s)].map(e => {
    const b = e.getBoundingClientRect(), text = e.tagName == "text" ? e.textContent : "";
    return {x: b.x, y: b.y + scrollY, width: b.width, height: b.height, fill: getComputedStyle(e).fill, text};
  });
  const found = {width: innerWidth, client: wide, scroll: document.documentElement.scrollWidth, over: over,
    height: document.documentElement.scrollHeight, cells: of("rect.cell"), bars: of("rect.bar"),
    fp8: of("svg rect.fp8"), dots: of("circle.dot"), svgs: of("svg"),
    texts: [...document.querySelectorAll("svg")].map(e => of("text", e))};
  parent.postMessage(JSON.stringify(found), "*");
});
</script>"""
# A window cannot be narrower than 500 pixels, a frame can: it is the window of the page in it, media queries and all.
HOST = """<!doctype html><style>body {{margin: 0}} iframe {{border: 0; width: {width}px; height: {height}px}}</style>
<script>addEventListener("message", e => {{
  const out = document.createElement("pre");
  out.id = "measured"; out.hidden = true; out.textContent = e.data;
  document.body.append(out);
}})</script><body><iframe src="{page}"></iframe></body>"""
LEAST_WINDOW = 500


def measure(page: Path, width: int, scratch: Path) -> dict[str, Any]:
    """Lay a page out at a width and return what it measures, in CSS pixels."""
    dom = _run(_framed(page, width, 1000, scratch), width, 1000, scratch, "--dump-dom", "--virtual-time-budget=10000")
    found = re.search(r'<pre id="measured"[^>]*>(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return measured


def value_of(page: Path, expression: str, scratch: Path) -> Any:
    """Return the value of an expression of JavaScript, a function call for example, once the page is loaded."""
    copy = scratch / "evaluated.html"
    script = f"""<script>addEventListener("load", () => {{
      const out = document.createElement("pre");
      out.id = "value"; out.hidden = true; out.textContent = JSON.stringify({expression});
      document.body.append(out);
    }});</script>"""
    copy.write_text(page.read_text(encoding="utf-8") + script, encoding="utf-8")
    dom = _run(copy, 1280, 1000, scratch, "--dump-dom", "--virtual-time-budget=10000")
    found = re.search(r'<pre id="value"[^>]*>(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found.group(1)))


SCHEMES = {"light": 1, "dark": 0}
"""Chromium's number of each color scheme that a reader may prefer."""


def screenshot(page: Path, width: int, height: int, picture: Path, scratch: Path, scheme: str = "light") -> None:
    """Take a picture of a page, all of it; it is at the left where the window must be wider."""
    host = _framed(page, width, height, scratch)
    prefer = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    _run(host, width, height, scratch, prefer, f"--screenshot={picture}")


def _framed(page: Path, width: int, height: int, scratch: Path) -> Path:
    """A page with the other in a frame of this size, and with what measures it."""
    copy = scratch / "measured.html"
    copy.write_text(page.read_text(encoding="utf-8") + MEASURE, encoding="utf-8")
    host = scratch / "host.html"
    host.write_text(HOST.format(width=width, height=height, page=copy.as_uri()), encoding="utf-8")
    return host


def _run(page: Path, width: int, height: int, scratch: Path, *options: str) -> str:
    assert PATH is not None
    command = [
        PATH,
        "--headless",
        "--no-sandbox",  # root, as in a container, has no other way; the page is our own
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--force-device-scale-factor=1",
        "--hide-scrollbars",  # they take no room on a phone
        f"--user-data-dir={scratch / 'profile'}",
        f"--window-size={max(width, LEAST_WINDOW)},{height}",
        *options,
        page.resolve().as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout


class Picture:
    """A PNG file of 8-bit RGB or RGBA, as Chromium writes it. Source: the PNG specification, sections 9 and 11."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        at, packed = 8, b""
        while at < len(data):
            (length,) = struct.unpack_from(">I", data, at)
            kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
            if kind == b"IHDR":
                self.width, self.height, depth, colors = struct.unpack(">IIBB", body[:10])
                assert depth == 8
                self.channels = {2: 3, 6: 4}[colors]
            elif kind == b"IDAT":
                packed += body
            at += 12 + length
        self._rows = self._unfilter(zlib.decompress(packed))

    def _unfilter(self, raw: bytes) -> list[bytearray]:
        step, stride = self.channels, self.width * self.channels
        rows: list[bytearray] = []
        above = bytearray(stride)
        for y in range(self.height):
            kind = raw[y * (stride + 1)]
            row = bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
            for x in range(stride if kind else 0):
                left = row[x - step] if x >= step else 0
                corner = above[x - step] if x >= step else 0
                row[x] = (row[x] + _predict(kind, left, above[x], corner)) & 255
            rows.append(row)
            above = row
        return rows

    def pixel(self, x: float, y: float) -> tuple[int, int, int]:
        """Red, green and blue."""
        at = int(x) * self.channels
        red, green, blue = self._rows[int(y)][at : at + 3]
        return red, green, blue


def _predict(kind: int, left: int, up: int, corner: int) -> int:
    if kind == 1:
        return left
    if kind == 2:
        return up
    if kind == 3:
        return (left + up) // 2
    guess = left + up - corner
    return min((left, up, corner), key=lambda value: abs(guess - value))
