"""Every notebook runs from its first cell to its last and writes its figures; the pages of ``make site`` show them."""

import copy
import functools
import html
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from conftest import needs_browser, shown

from notebooks import execute, paper

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p.name for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
STORY = [name for name in NOTEBOOKS if name[:2] in ("00", "01", "02", "03")]


def wordless_pictures(notebook: Path) -> list[int]:
    """Cells with a picture that says nothing to who cannot see it."""
    cells = enumerate(nbformat.read(notebook, as_version=4).cells)
    outputs = [(number, output) for number, cell in cells for output in cell.get("outputs", [])]
    pictures = [(number, x.metadata) for number, x in outputs if "image/png" in x.get("data", {})]
    return [number for number, metadata in pictures if not metadata.get("image/png", {}).get("alt")]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_committed_picture_is_told_in_words(notebook):
    assert not wordless_pictures(ROOT / "notebooks" / notebook)


def test_notebooks_and_figures_together_stay_small():
    files = [*(ROOT / "figures").iterdir(), *(ROOT / "notebooks").glob("*.ipynb")]
    assert sum(path.stat().st_size for path in files) < 12e6


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs_with_its_answers_and_writes_its_figures(notebook, tmp_path, monkeypatch):
    for name, value in (("DATA", str(ROOT / "data")), ("PROFILE", "tiny"), ("OUT", "")):  # the kernel's, too
        monkeypatch.setenv(f"BASINLAB_{name}", value)
    monkeypatch.setattr(execute, "PROFILE", "tiny"), monkeypatch.chdir(tmp_path)
    content = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    text = "".join(cell.source for cell in content.cells if cell.cell_type == "markdown").partition("## Exercises")[2]
    content.cells += [nbformat.v4.new_code_cell(code) for code in re.findall("```python\n(.*?)```", text, re.DOTALL)]
    nbformat.write(content, tmp_path / notebook)
    monkeypatch.setattr(sys, "argv", ["execute", str(tmp_path / notebook), "--out", str(tmp_path / "out")])
    execute.main()
    assert not wordless_pictures(done := tmp_path / "out/notebooks" / notebook) and "Warning: " not in done.read_text()
    made, committed = ({p.name for p in (at / "figures").glob(notebook[:3] + "*")} for at in (tmp_path / "out", ROOT))
    assert made == committed
    manifest = json.loads((tmp_path / "out/figures/manifest.json").read_text()) if made else {}  # 04 saves no figure
    assert {Path(name).stem for name in made if name.endswith(".png")} == {*manifest}
    told = {"weights", "prompts", "seeds", "section", "versions", "commit"}
    assert all(told <= set(entry) for entry in manifest.values())


def test_notebooks_run_two_at_a_time_and_one_that_fails_is_named_and_stops_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("BASINLAB_OUT", ""), monkeypatch.setenv("OMP_NUM_THREADS", "1"), monkeypatch.chdir(tmp_path)
    waits = "import pathlib, time\nwhile not pathlib.Path('made').exists(): time.sleep(0.1)"
    codes = {"a": waits, "b": "open('made', 'w')", "c": "1 / 0", **dict.fromkeys("de", "import time; time.sleep(600)")}
    for name, code in codes.items():
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(sys, "argv", ["execute", *map(str, sorted(tmp_path.glob("*"))), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"c\.ipynb, cell 1: ZeroDivisionError"):
        execute.main()
    assert {path.name for path in tmp_path.glob("out/notebooks/*.ipynb")} == {"a.ipynb", "b.ipynb"}


def test_each_figure_and_table_of_the_paper_has_cells_and_a_line_with_our_number_and_verdict(tmp_path, monkeypatch):
    assert (ROOT / "notebooks/paper.md").read_text(encoding="utf-8") == paper.page(), "run notebooks/paper.py"
    monkeypatch.setattr(paper, "FIGURES", tmp_path)
    entry = {"paper": "Fig. 6, Fig. 9", "section": "2.1"}
    (tmp_path / "manifest.json").write_text(json.dumps({"02_strip": entry, "00_scale": {"section": "0.4"}}))
    (tmp_path / "02_strip.png").touch()
    claims = "claim,value,low,high,n,goal,verdict\nat most one flip: monotone,.95,.9,.98,64,at least .9,yes\n"
    claims += "DTP: nothing is memorized,.2,.1,.3,64,at most .05,no\n"
    (tmp_path / "02_claims.csv").write_text(claims)
    lines = {line.split("|")[1].strip(): line for line in paper.page().splitlines() if line.startswith("| ")}
    assert {*lines} >= {*(f"Fig. {n}" for n in range(1, 10)), *(f"Table {n}" for n in (1, 2, 3))}
    sixth = lines["Fig. 6"]
    assert "02_transition_point_sweep.ipynb" in sixth and "2.1" in sixth and "../figures/02_strip.png" in sixth
    assert "0.95 [0.90, 0.98], n = 64 (02, 2.8; goal: at least .9); copied under DTP: 0.20" in sixth
    assert "**no**" in sixth and "**open**" in lines["Table 1"]  # the worst of both
    cells = [cell for name in NOTEBOOKS for cell in nbformat.read(ROOT / "notebooks" / name, as_version=4).cells]
    tags = {tag for cell in cells for tag in cell.metadata.get("tags", [])}
    assert tags >= {*(f"figure-{n}" for n in range(1, 10)), *(f"table-{n}" for n in range(1, 4))}


@pytest.mark.parametrize("notebook", STORY)
def test_cells_are_short_and_every_picture_is_asked_about_before_and_told_after(notebook):
    cells = nbformat.read(ROOT / "notebooks" / notebook, as_version=4).cells
    assert max(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code") <= 15
    asked = told = True
    for cell in cells:
        drawn = "plotting.save(" in cell.source and "mystnb" in cell.metadata
        if cell.cell_type == "markdown":
            asked, told = asked or "**Before you look" in cell.source, told or "**What to see" in cell.source
        elif drawn:
            assert told and asked, cell.source
            asked, told = False, False


def test_one_figure_runs_set_up_and_all_cells_that_it_needs_and_no_others():
    notebook = nbformat.read(ROOT / "notebooks/02_transition_point_sweep.ipynb", as_version=4)
    count, kept = len(notebook.cells), execute.only(notebook, "figure-2")
    code = "\n".join(cell.source for cell in kept.cells)
    assert 0 < len(kept.cells) < count / 2 and "02_story_" in code and "02_depends_on" not in code
    assert "import basinlab" in code and kept.cells[-1].source.count("02_story_") == 1
    assert execute.only(nbformat.read(ROOT / "notebooks/00_background.ipynb", as_version=4), "figure-2") is None
    sources = {name: nbformat.read(ROOT / "notebooks" / name, as_version=4) for name in STORY}
    tags = {(name, tag) for name in STORY for cell in sources[name].cells for tag in cell.metadata.get("tags", [])}
    for name, tag in sorted(tags):
        code = "\n".join(cell.source for cell in execute.only(copy.deepcopy(sources[name]), tag).cells)
        undefined = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
        done = subprocess.run(undefined, input=code, capture_output=True, text=True)
        assert done.returncode == 0, (name, tag, done.stdout)


PAGES = [*(Path(name).stem for name in NOTEBOOKS), "facilitating", "index", "paper", "study-notes.ko"]
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


def test_every_notebook_is_a_page_where_no_link_or_picture_is_broken_and_nothing_needs_a_network(site):
    texts, words = {page: (site / f"{page}.html").read_text() for page in PAGES}, (site / "searchindex.js").read_text()
    assert all(f'href="{page}.html"' in texts["index"] and f'"{page}"' in words for page in {*PAGES} - {"index"})
    assert ".html#the-funnel-drawn" in texts["paper"]
    local = r'\s(?:href|src)="(?![a-z]+:|#|//)([^"#?]+)'
    links = {(page, link) for page, text in texts.items() for link in re.findall(local, text)}
    assert len(links) > 50 and not {(page, link) for page, link in links if not (site / html.unescape(link)).exists()}
    elsewhere = r'<(?:script|link)[^>]*(?:src|href)="(https?:[^"]*)'
    assert not [(page, address) for page, text in texts.items() for address in re.findall(elsewhere, text)]
    text = texts["01_basin_observation"]
    formulas = re.findall(r'<img src="data:image/svg[^>]*alt="([^"]*)" class="formula"', text)
    assert len(formulas) >= 10 and any("Phi" in tex for tex in formulas) and "\\(" not in text


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
