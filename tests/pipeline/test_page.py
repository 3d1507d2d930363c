"""The page and the cards that the pipeline ends with, as a person opens them."""

import dataclasses
import json
import os
import re
import shutil

import pytest
from diffusers import DDPMPipeline
from huggingface_hub import ModelCard
from PIL import Image
from playwright.sync_api import sync_playwright

from stages.finetune.params import JacobianParams, LossParams
from stages.report.card import write_card, write_losses
from stages.report.report_data import LossRecord, read_report_data
from stages.report.table import shares_to_text

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, without a window."""
    if CHROMIUM is None:
        assert "CI" not in os.environ, "install Chromium: the page is not tested without it"
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, finished):
    """Open the page at some width and in some colours: the page, what it requested, and what its console said."""
    contexts = []

    def open_page(width, scheme):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page, requests, console = context.new_page(), [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: console.append(message.text))
        page.on("pageerror", lambda error: console.append(str(error)))
        page.goto((finished.path / "reports/index.html").as_uri())
        return page, requests, console

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_holds_everything_it_shows(opened, width, scheme):
    """No request leaves it, the console stays silent, every picture loads, and nothing is wider than the screen."""
    page, requests, console = opened(width, scheme)
    pictures = page.evaluate("[...document.images].map(image => image.naturalWidth)")

    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert console == []
    assert len(pictures) == 17
    assert min(pictures) > 90
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("[...document.images].every(image => image.alt)")


def test_the_page_wears_the_colours_that_the_reader_wants(opened):
    """Light or dark, the drawings too."""
    colours, sources = [], []
    for scheme in ("light", "dark"):
        page, *_ = opened(1280, scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        sources.append(page.evaluate("document.querySelector('picture img').currentSrc"))

    assert len(set(colours)) == len(set(sources)) == 2


def test_the_page_tells_what_was_measured(opened, finished):
    """Results, truth table, protocol and lineage, with the id beside the numbers; some of it is folded."""
    page, *_ = opened(1280, "light")
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    text = page.inner_text("body")
    results = (finished.path / "reports/summary/results.md").read_text().splitlines()

    rows = [line for line in results if line.startswith("|")][2:]
    for name, line in zip(("dense", "pruned", "finetuned"), rows, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        row = page.locator("#results-table tr", has=page.get_by_role("cell", name=name, exact=True))
        assert row.locator("td").all_inner_texts() == cells
    assert re.search(r"Protocol [0-9a-f]{12}", text)
    for word in ("efficiency", "real_sha256", "pruning plan", "sampler.steps", "±"):
        assert word in text
    shares = shares_to_text(read_report_data(finished.path / "artifacts", finished.path / "reports").record)
    assert shares
    assert text.count(shares) == 1


def test_every_released_model_has_a_card_that_the_hub_reads(finished):
    """Licence of the base, results with their protocol, pictures that exist, lineage."""
    for name in ("pruned", "finetuned"):
        folder = finished.path / "artifacts/released" / name
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "apache-2.0"
        assert card.data.library_name == "diffusers"
        assert {result.metric_type for result in card.data.eval_results} == {
            "fid",
            "fid_dense",
            "kid",
            "precision",
            "recall",
            "ssim",
        }
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.text):
            with Image.open(folder / picture) as image:
                assert min(image.size) >= 60
        for word in ("fewer parameters", "Protocol ", "trust_remote_code=True", "pruning plan", "least similar"):
            assert word in card.text
    assert "steps of Muon at learning rate 0.001 and Adam at learning rate 0.0005" in card.text


def test_the_card_says_how_geglu_was_cut(finished):
    """Where values and gates were ranked apart, and only there."""
    report = read_report_data(finished.path / "artifacts", finished.path / "reports")
    model = finished.path / "artifacts/pruned"
    halves = dataclasses.replace(report, prune=report.prune.model_copy(update={"geglu": "halves"}))

    end = "interleaved order{}, then least-squares compensation."
    assert end.format(", values and gates of GEGLU ranked apart") in write_card(halves, "pruned", model)
    assert end.format("") in write_card(report, "pruned", model)


def test_the_card_names_every_loss_in_use():
    """A record from before the Jacobian loss reads like one without it."""
    older = {"noise": 1.0, "output": 0.0, "feature": 0.0, "min_snr": 5.0}
    jacobian = JacobianParams(weight=0.1, every=4, images=16)
    current = LossParams(noise=0, output=1, jacobian=jacobian).model_dump(mode="json")

    assert write_losses(LossRecord(**older)) == "1 × squared error of the prediction, min-SNR weights with γ 5"
    assert write_losses(LossRecord(**current)) == (
        "1 × squared distance from the dense model's prediction + 0.1 × squared difference of the squared norms of one "
        "random vector times the Jacobian of each model, on 16 images, once in 4 steps, 4-fold"
    )


def test_the_card_tells_the_forms_of_the_jacobian_loss_apart():
    """What the difference is relative to, how many vectors there are and how the weight rises are part of the loss."""
    jacobian = JacobianParams(weight=0.1, relative=True, vectors=4, ramp_steps=100)
    loss = LossParams(noise=0, output=1, jacobian=jacobian).model_dump(mode="json")

    assert write_losses(LossRecord(**loss)).partition(" + ")[2] == (
        "0.1 × squared relative difference of the squared norms of one random vector times the Jacobian of each model, "
        "averaged over 4 vectors, with a weight that rises from 0 over 100 steps"
    )


def test_the_three_lines_of_the_card_load_the_model(finished):
    """As they stand there, with the folder put in."""
    folder = finished.path / "artifacts/released/finetuned"
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    loading = code.replace("PATH/TO/THIS/FOLDER", str(folder)).rsplit("\n", 2)[0]
    names = {}
    exec(loading, names)

    assert isinstance(names["pipeline"], DDPMPipeline)
    assert names["pipeline"].unet.config["pruned_widths"]


def test_dvc_shows_the_metrics_and_plots(copy_finished):
    """The metrics have a row for each model, and every plot renders."""
    workspace = copy_finished("plots")
    shown = workspace.run("dvc", "metrics", "show", "--md", "reports/evaluate/metrics/finetuned.json")
    assert shown.returncode == 0, shown.stderr
    assert "ssim_interval" in shown.stdout
    plots = workspace.run("dvc", "plots", "show", "--out", "plots")
    assert plots.returncode == 0, plots.stdout + plots.stderr
    assert "pareto.svg" in (workspace.path / "plots/index.html").read_text()


@pytest.mark.e2e
def test_a_pair_is_compared_and_enlarged_by_keyboard(opened):
    """The slider moves by arrows; Enter on a pair opens it, arrows go on to the next, and Escape returns."""
    page, _, console = opened(1280, "light")
    page.locator(".compare input").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".compare canvas + canvas").evaluate("it => it.style.clipPath") == "inset(0px 49% 0px 0px)"

    first = page.get_by_role("button", name="Enlarge pair 1,")
    first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#zoom").is_visible()
    page.locator("#zoom [data-step='1']").focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#zoom h3").startswith("Pair 2, SSIM ")
    page.keyboard.press("Escape")
    assert not page.locator("#zoom").is_visible()
    assert first.evaluate("it => it === document.activeElement")
    assert console == []


@pytest.mark.e2e
def test_a_term_is_explained_on_focus_and_hover(opened):
    """And inside the screen of a telephone."""
    page, *_ = opened(390, "light")
    for show in ("focus", "hover"):
        getattr(page.locator("#results-table .term").first, show)()
        assert page.inner_text("#tip").startswith("dense: before pruning")
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390


@pytest.mark.e2e
def test_what_is_cut_is_hinted_at(opened):
    """Every table that is wider than the screen has a hint, and no other."""
    page, *_ = opened(390, "light")
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    page.wait_for_timeout(100)
    boxes = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(it => [it.scrollWidth > it.clientWidth + 1, it.matches('.cut')])"
    )

    assert [is_cut for is_cut, _ in boxes] == [has_hint for _, has_hint in boxes]
    assert any(is_cut for is_cut, _ in boxes)


def test_the_page_and_the_cards_begin_with_the_verdict(opened, finished):
    """The sentence of verdict.json, in the colour of its level."""
    verdict = json.loads((finished.path / "reports/summary/verdict.json").read_text())
    page, *_ = opened(1280, "light")

    assert page.inner_text("#verdict p").endswith(verdict["sentence"])
    assert verdict["level"] in page.locator("#verdict").get_attribute("class").split()
    assert (finished.path / "reports/summary/results.md").read_text().startswith(f"**{verdict['sentence']}**\n")
    card = (finished.path / "artifacts/released/finetuned/README.md").read_text()
    assert f"finetuned\n\n**{verdict['sentence']}**\n" in card
