"""The documentation site: built strictly and offline, and opened in a browser."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import pytest

from tests.pipeline.test_page import browser  # noqa: F401  # a fixture
from tests.servers import ROOT

pytestmark = pytest.mark.e2e
NOBODY = "http://127.0.0.1:9"
"""A proxy that does not answer: what asks for another host through it fails."""
LOADING = {"href": {"link"}, "src": None, "srcset": None, "poster": None, "data": {"object"}}
"""Attribute of HTML -> the elements in which it loads something; None for all."""
CSS_LOAD = re.compile(r"""(?:url\(|@import)\s*["']?([^"')]+)""")
JS_LOAD = re.compile(r"""\b(?:import|importScripts|fetch|Worker)\s*\(?\s*["'](https?:[^"']+)""")
OPENED = [
    "index.html",
    "architecture.html",
    "adr/0022-layout-of-packages.html",
    "api/importance.html",
    "notebooks/prune-from-python.html",
    "how-to/extend.html",
]
DIAGRAMS = {"index.html": 1, "architecture.html": 1, "adr/0022-layout-of-packages.html": 2}
"""Page -> the number of its diagrams; others have none."""


def build(repository, folder):
    """Build the site as `make docs` does, with a proxy for all other hosts that does not answer."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOBODY)
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", folder]
    environment = {**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Loads(HTMLParser):
    """Collects the addresses that a page loads by itself, and its ids."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.ids = CSS_LOAD.findall("".join(re.findall(r"<style.*?</style>", text, re.DOTALL))), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Note what one element loads."""
        attributes = dict(attrs)
        self.ids.add(attributes.get("id"))
        self.addresses += CSS_LOAD.findall(attributes.get("style") or "")
        for name, tags in LOADING.items():
            if name in attributes and (tags is None or tag in tags):
                self.addresses.append(attributes[name])


def foreign(addresses):
    """Those that are on another host."""
    return [it for it in addresses if urlsplit(it.strip()).netloc]


def test_no_page_loads_from_another_host(site):
    """Neither fonts, scripts, styles and pictures, nor a connection in advance."""
    pages = {path: Loads(path.read_text()) for path in site.rglob("*.html")}

    assert len(pages) > 60
    assert {path.name: found for path, page in pages.items() if (found := foreign(page.addresses))} == {}
    assert [it for path in site.rglob("*.css") for it in foreign(CSS_LOAD.findall(path.read_text()))] == []
    assert [it for path in site.rglob("*.js") for it in JS_LOAD.findall(path.read_text())] == []


def test_the_build_refuses_what_leads_nowhere(tmp_path):
    """Links and anchors that do not exist, and a page that no menu names; all are listed."""
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "mlflow", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    with (tmp_path / "docs/page.md").open("a") as page:
        page.write("\n[link](nowhere.md), [code](../stages/nowhere.py), [anchor](metrics.md#nowhere)\n")
    (tmp_path / "docs/how-to/unlisted.md").write_text("# Unlisted\n")
    built = build(tmp_path, tmp_path / "site")

    assert built.returncode == 1
    assert built.stderr.count("WARNING") == 4
    for found in ("'nowhere.md'", "'../stages/nowhere.py'", "'metrics.md#nowhere'", "- docs/how-to/unlisted.md"):
        assert found in built.stderr


def test_the_search_for_foreign_hosts_finds_them():
    """In each way that a page, a style or a script can load."""
    page = Loads(
        '<link rel="preconnect" href="https://a.org"><script src="//b.org/x.js"></script><a href="https://c.org">c</a>'
        '<style>@import "https://d.org/x.css";</style><p style="background: url(https://e.org/x.png)"><img src="x.png">'
    )

    assert {urlsplit(it).netloc for it in foreign(page.addresses)} == {"a.org", "b.org", "d.org", "e.org"}
    assert JS_LOAD.findall("importScripts('https://f.org/x.js')") == ["https://f.org/x.js"]


def test_the_api_shows_what_can_be_extended_and_called(site):
    """Criteria, losses, families, the call from images to a plan, and each key of params.yaml, by their full names.

    No asterisk of a docstring was taken for emphasis.
    """
    pages = [path.read_text() for path in (site / "api").glob("*.html")]
    ids = set().union(*(Loads(page).ids for page in pages))

    assert [found for page in pages for found in re.findall("<em>.*?</em>", page)] == []
    assert {
        "stages.tools.one_shot.plan_one_shot",
        "stages.prune.surgery.cut",
        "stages.importance.criteria.CRITERIA",
        "stages.finetune.loss.LOSSES",
        "stages.models.families.Family",
        "stages.evaluate.quality.frechet_distance",
        "stages.protocol.protocol.Protocol",
        "stages.prune.params.PruneParams.round_to",
        "stages.finetune.params.LossParams.min_snr",
    } <= ids


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_pages_ask_nobody_else_and_fit_the_screen(browser, address, width, scheme):  # noqa: F811
    """Pictures load, diagrams are drawn, the console stays silent, and nothing is wider than the screen."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, requests, console = context.new_page(), [], []
    page.on("request", lambda it: requests.append(it.url))
    page.on("console", lambda it: console.append(it.text))
    page.on("pageerror", lambda it: console.append(str(it)))
    for path in OPENED:
        page.goto(address + path)
        page.wait_for_function("!document.querySelector('pre.mermaid')")
        diagrams = page.evaluate("[...document.querySelectorAll('.diagram > *')].map(it => it.offsetHeight)")
        assert len(diagrams) == DIAGRAMS.get(path, 0)
        assert min(diagrams, default=100) > 80
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 90 && image.alt)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
    page.wait_for_load_state("networkidle")
    context.close()

    assert [url for url in requests if not url.startswith((address, "data:"))] == []
    assert console == []


def test_the_search_finds_a_function(browser, address):  # noqa: F811
    """By its name, on the page of the API that describes it, without another host."""
    page, requests = browser.new_page(), []
    page.on("request", lambda it: requests.append(it.url))
    page.goto(address, wait_until="networkidle")  # with the index
    page.get_by_placeholder("Search").press_sequentially("plan_one_shot")
    page.locator(".md-search-result__link").first.wait_for()
    links = page.locator(".md-search-result__link").evaluate_all("all => all.map(it => it.href)")
    page.close()

    assert any(urlsplit(it).path == "/api/plan-and-cut.html" for it in links)
    assert [url for url in requests if not url.startswith((address, "data:"))] == []
