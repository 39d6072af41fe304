"""The pages of ``make site``: all there, linked, searchable, with pictures, and readable on a phone."""

import functools
import html
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import needs_browser, shown

ROOT = Path(__file__).parents[1]
PAGES = [p.stem for p in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
PAGES += ["facilitating", "index", "paper", "study-notes.ko"]
WIDTHS = (390, 1280)  # of a phone and of a desktop

# loads a page in a frame of each device's width and writes down what a reader would meet
FRAME = '<iframe style="border:0;width:{width}px;height:900px" src="{page}.html"></iframe>'
HARNESS = """<pre id=out></pre><script>window.onload = () => setTimeout(() => {
  out.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(f => {
    const d = f.contentDocument, w = f.contentWindow, seen = e => e.getBoundingClientRect();
    const pictures = [...d.querySelectorAll("article img")];
    return {
      over: d.documentElement.scrollWidth - w.innerWidth,
      heading: seen(d.querySelector("article h1")).width,
      wordless: pictures.filter(i => !i.alt).length,
      broken: pictures.filter(i => i.complete && !i.naturalWidth && !i.src.startsWith("http")).length,
      wide: pictures.filter(i => seen(i).right > w.innerWidth + 1).length,
      pictures: pictures.length,
    };
  }));
}, 800);</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "notebooks/site", "notebooks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def pages(site):
    return [(page, (site / f"{page}.html").read_text()) for page in PAGES]


def test_every_notebook_is_a_page_in_the_contents_and_the_search(site):
    index, words = (site / "index.html").read_text(), (site / "searchindex.js").read_text()
    assert all(f'href="{page}.html"' in index for page in PAGES if page != "index")
    assert all(f'"{page}"' in words for page in PAGES)
    assert "funnel" in words


def test_no_link_or_picture_within_the_pages_is_broken(site):
    local = r'\s(?:href|src)="(?![a-z]+:|#|//)([^"#?]+)'
    links = {(page, link) for page, text in pages(site) for link in re.findall(local, text)}
    assert len(links) > 50 and not {(page, link) for page, link in links if not (site / html.unescape(link)).exists()}


def test_pages_need_no_network_for_scripts_styles_and_formulas(site):
    elsewhere = r'<(?:script|link)[^>]*(?:src|href)="(https?:[^"]*)'
    assert not [(page, address) for page, text in pages(site) for address in re.findall(elsewhere, text)]
    text = (site / "01_basin_observation.html").read_text()
    formulas = re.findall(r'<img src="data:image/svg[^>]*alt="([^"]*)" class="formula"', text)
    assert len(formulas) >= 10 and any("Phi" in tex for tex in formulas)
    assert "\\(" not in text  # none is left to a script


@pytest.fixture(scope="module")
def server(site):
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@needs_browser
@pytest.mark.parametrize("page", PAGES)
def test_pages_fit_the_devices(page, site, server, tmp_path):
    frames = "".join(FRAME.format(width=width, page=page) for width in WIDTHS)
    (site / f"harness-{page}.html").write_text(frames + HARNESS)
    text = shown(f"{server}/harness-{page}.html", tmp_path)
    found = re.search(r'<pre id="out">(\[.*?\])</pre>', text)
    assert found, text[-2000:]
    for seen in json.loads(found[1]):
        assert seen["over"] <= 0 and seen["heading"] > 200 and seen["broken"] == 0 and seen["wide"] == 0, seen
        assert seen["wordless"] == 0, seen
        assert seen["pictures"] > 0 or page == "facilitating"
