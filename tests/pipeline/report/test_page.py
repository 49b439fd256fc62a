"""The page of a run is complete and self-contained, and works in a browser."""

import dataclasses
import html
import json
import os
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from helpers import BROWSER
from PIL import Image
from playwright.sync_api import sync_playwright
from runs import MERGED, PLAN, REPORT, SHARED, SMALLER, STAGE, causal_lm, healed_by, recipe, results, written

from hf_layerfuse import CheckpointError, CollapseRecipe, Drop, Fuse, Linearize, MergeRecipe, Plan, cli
from hf_layerfuse.cli import main
from hf_layerfuse.pipeline.report.page import page, write_page
from hf_layerfuse.pipeline.samples import Continuation, Distance, Prediction, Samples
from hf_layerfuse.plan import CandidatePlan, EditLoss, FrontierPoint, PlanLatency, PlanNotes, RefitReport
from hf_layerfuse.plan.notes import OperatorLoss
from hf_layerfuse.plan.words import change_table


class Tags(HTMLParser):
    """Every element with its attributes; an element closed where it is not open is an error."""

    VOID = ("meta", "img", "input", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def without_pictures(monkeypatch):
    """Pages with one picture, of a pixel: drawing takes most of the time of a page."""
    picture = {"data": "", "shows": "nothing", "width": 1, "height": 1}
    monkeypatch.setattr("hf_layerfuse.pipeline.report.page._pictures", lambda plan, healed: {"plan.png": picture})


@pytest.mark.parametrize(
    ("plan", "made"),
    [
        (PLAN, recipe()),
        (SHARED, recipe()),
        (MERGED, recipe(fusion=None, merge=MergeRecipe(latency_budget=0.5), task="image-classification")),
    ],
    ids=["depth", "share", "merge"],
)
def test_has_what_the_run_has(plan, made):
    """The page has results with their shares, every change in words, pictures with alternative texts, command and
    recipe."""
    text = page(plan, results(), made)
    tags = Tags(text).found
    shown = html.unescape(re.sub(r"<[^>]+>", " ", text))
    assert "750 (75%)" in shown
    assert "20.0 (67%)" in shown
    for row in change_table(plan)[1:]:
        assert all(cell in shown for cell in row)
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == 2
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert "Made from user/model: 75% of the parameters" in shown
    assert "Measured on glue (validation)." in shown
    assert "2 steps in 72 s, mixed precision: bf16; the weights of step 2 were kept." in shown
    assert "accelerate launch fuse.py x" in shown
    assert f"model: {made.model}" in shown
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in tags if tag == "th")
    assert ("html", {"lang": "en"}) in tags


def test_needs_nothing_beside_it():
    """The page refers to no address, except those shown as text, and to no other file."""
    for _, attributes in Tags(page(PLAN, results(), recipe())).found:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in page(PLAN, results(), recipe())


@pytest.mark.usefixtures("without_pictures")
def test_what_comes_from_the_run_is_text():
    """Names and commands appear as text, never as markup."""
    evil = "<script>alert(1)</script>"
    text = page(PLAN, results(command=evil, environment={evil: evil}), recipe(model=evil))
    assert [tag for tag, _ in Tags(text).found].count("script") == 1
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4


def test_says_why(tmp_path):
    """The page has the losses of candidates, single edits, other budgets and the repair, as the notes have them."""
    notes = PlanNotes(
        competition=(CandidatePlan((Drop("layer", 3),), 0.25, 0.5), CandidatePlan((Linearize(1), Linearize(2)), 0.125)),
        losses=(EditLoss(Linearize(4), 0.0625),),
        frontier=(FrontierPoint(0.6, 0.75),),
        refit=RefitReport(0.5, 0.25, kept=True),
    )
    shown = page(dataclasses.replace(PLAN, notes=notes), results(), recipe())
    assert shown.index("linear MLPs of layers 1, 2") < shown.index("layer 3 dropped")
    for text in ("0.125", "0.0625", "60%", "0.75", "It was kept."):
        assert text in shown
    notes = PlanNotes(losses=(EditLoss(Linearize(4), 0.375),), latency_ms=PlanLatency(2.0, 1.0))
    assert "the MLP of layer 4 made linear" in page(dataclasses.replace(PLAN, notes=notes), results(), recipe())


def test_shows_who_lost():
    """Each group of the plan has its operators, the taken one first and marked; other groups are listed after them."""
    taken = Fuse("layer", (2, 3), operator="select", keep=2)
    operators = (
        OperatorLoss("layer", (2, 3), "freeze", 0.5, keep=2),
        OperatorLoss("layer", (2, 3), "select", 0.25, keep=2),
        OperatorLoss("layer", (4, 5), "mean", 0.75, align="rotation"),
    )
    competition = (CandidatePlan((taken,), 0.2, 0.4), CandidatePlan((Fuse("layer", (4, 5)),), 0.9, 1.8))
    apart = [[0.0 if i == j else 0.98 + 0.001 * (i + j) for i in range(12)] for j in range(12)]
    notes = PlanNotes(operators=operators, competition=competition, distances={"layer": apart})
    text = page(Plan("bert", 12, (taken,), notes), results(), recipe())
    marked = re.findall(r'<tr class="taken">(.*?)</tr>', text)
    assert ["select, layer 2" in row for row in marked] == [True, True]
    assert "layers 2, 3 (select, layer 2)" in marked[0]
    assert text.index("freeze, layer 2</td>") < text.index("mean, aligned by rotation")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert any("Calibration loss" in caption for caption in captions)
    assert not any("Distances" in caption for caption in captions), "all are alike, so this picture shows nothing"


@pytest.mark.usefixtures("without_pictures")
def test_begins_with_a_verdict():
    """Tiles at the top have size, speed, quality and changes, and quality has the interval of its change."""
    after = dataclasses.replace(
        SMALLER, bytes=3000, metrics={**SMALLER.metrics, "accuracy_change_interval": [-0.05, -0.01]}
    )
    text = page(PLAN, results(healed=after), recipe())
    shown = html.unescape(re.sub(r"<[^>]+>", " ", text))
    assert re.search(r'class="tiles">.*?</ul>', text, re.DOTALL).group().count("<li") == 4
    assert text.index('class="tiles"') < text.index("<h2>")
    for words in (
        "25% smaller",
        "as fast",
        "\u22122.5 points",
        "worse (95% interval: -5.0 to -1.0)",
        "12 to 11 layers",
    ):
        assert words in shown
    assert "The interval of a change is a bootstrap over the same rows" in shown
    without = page(PLAN, results(), recipe())
    assert "no interval" in without
    assert "Sample outputs" not in without


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (
            Samples(rows=1, continuations=(Continuation("It was <i>", " a dark night", " a dark <b>day</b>"),)),
            ["It was &lt;i&gt;", '<span class="soft">a dark </span>&lt;b&gt;day&lt;/b&gt;'],
        ),
        (
            Samples(rows=9, outputs=9, improved=1, worsened=2, predictions=(Prediction(3, "<a>", "<a>", "b", "<u>"),)),
            ["3 changed: 1 became right, 2 became wrong. The first of these:", "&lt;u&gt;", "became wrong", "row 3"],
        ),
        (Samples(rows=9, outputs=9), ["Of the predictions for the first 9 rows, none changed."]),
        (Samples(rows=9, distances=(Distance(3, 0.25, "<u>"),)), ["0.250", "&lt;u&gt;"]),
    ],
)
def test_shows_sample_outputs(samples, words):
    """Outputs of both models appear as text, never as markup; samples survive their file."""
    given = results(samples=Samples.from_dict(json.loads(json.dumps(samples.to_dict()))))
    assert given.samples == samples
    text = page(PLAN, given, recipe())
    Tags(text)
    assert all(part in text for part in words)


@pytest.mark.usefixtures("without_pictures")
def test_says_what_training_did():
    """Each round has a sentence, a round without improvement says so, and a run without training has none. The number
    of test examples is given if it is known."""
    reports = dataclasses.replace(REPORT, best_step=0), dataclasses.replace(REPORT, steps=5000, best_step=5000)
    counted = dataclasses.replace(STAGE, metrics={"accuracy": 0.9, "examples": 1234})
    shown = page(PLAN, results(rounds=healed_by(*reports), before=counted), recipe())
    assert "healing found nothing better, so the initial weights were kept" in shown
    assert "5,000 steps in 72 s" in shown
    assert "Measured on glue (validation), 1,234 examples." in shown
    assert "Training</h2>" not in page(PLAN, results(rounds=(), healed=None), recipe())


@pytest.mark.filterwarnings("ignore::hf_layerfuse.errors.LayerFuseWarning")
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_page_of_a_run(tmp_path, capsys):
    """The output of `fuse.py` is enough. The file is written as a whole, and can be rewritten; nothing else changes."""
    assert cli.run([*causal_lm(tmp_path), "--evaluate.latency", "false"]) == 0
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    for _ in range(2):
        assert main(["report", str(out)]) == 0
        assert capsys.readouterr().out == f"Written: {out / 'report.html'}\n"
    Tags((out / "report.html").read_text())
    assert "accelerate launch fuse.py" in (out / "report.html").read_text()
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "report.html"} == before


def test_nothing_else_is_replaced(tmp_path, capsys):
    """A file that is not a report stays, and so does everything if the results are damaged."""
    folder = written(tmp_path / "out")
    (tmp_path / "notes.html").write_text("mine")
    assert main(["report", str(folder), "--output", str(tmp_path / "notes.html")]) == 1
    assert "exists and is not a report: name another file with --output" in capsys.readouterr().err
    assert (tmp_path / "notes.html").read_text() == "mine"
    speaks_of_it = f"<!doctype html>\n<p>How a page begins:</p>\n<!-- {write_page(folder).read_text()} -->"
    (tmp_path / "notes.html").write_text(speaks_of_it)
    with pytest.raises(CheckpointError, match="is not a report"):
        write_page(folder, tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == speaks_of_it
    for taken in (tmp_path, os.devnull):  # neither of which is a file
        with pytest.raises(CheckpointError, match="is not a report"):
            write_page(folder, taken)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_page(folder, tmp_path / "nowhere" / "page.html")
    for name, content in (("plan.json", "{}"), ("results.json", "[]"), ("results.json", "{"), ("results.json", "{}")):
        damaged = written(tmp_path / "damaged")
        (damaged / name).write_text(content)
        assert main(["report", str(damaged)]) == 1
        assert "is not the result of a run" in capsys.readouterr().err
        assert not (damaged / "report.html").exists()
    half = [{name: None} for name in ("before", "metrics_on", "environment")]
    for changes in (*half, {"fused": None, "healed": None}, {"before": {}}, {"heal": {"train_loss": 5}}):
        damaged = written(tmp_path / "half")
        tree = json.loads((damaged / "results.json").read_text()) | changes
        kept = {name: value for name, value in tree.items() if value is not None}
        (damaged / "results.json").write_text(json.dumps(kept))
        assert main(["report", str(damaged)]) == 1, changes
        assert "is not the result of a run" in capsys.readouterr().err
        assert {path.name for path in damaged.iterdir()} == {"plan.json", "results.json"}
    strange = written(tmp_path / "strange")
    (strange / "plan.json").write_text(json.dumps({**PLAN.to_dict(), "notes": {"competition": [{"plan": 1}]}}))
    assert main(["report", str(strange)]) == 1
    assert "the notes of the plan cannot be read: 'edits' is missing" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent")]) == 1
    assert "Name a folder that fuse.py has written" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser found: install chromium")
def test_works_in_a_browser(tmp_path):
    """In Chromium, on light and dark pages and on a phone: no error, no network request, nothing cut off, and the
    filter shows the matching rows. Without scripts, all rows are visible; folded content is printed."""
    losses = [EditLoss(Linearize(layer), 0.1 * layer + 0.1) for layer in range(12)]
    plan = Plan("gpt2", 12, tuple(Linearize(layer) for layer in range(1, 11)), PlanNotes(losses=losses))
    path = write_page(written(tmp_path / "out", plan, recipe(fusion=None, collapse=CollapseRecipe(count=10))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width in (1000, 390):
                tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
                wrong, asked = [], []
                tab.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
                tab.on("console", lambda message, wrong=wrong: wrong.append(message.text))
                tab.on("request", lambda request, asked=asked: asked.append(request.url))
                tab.goto(path.as_uri())
                assert not wrong
                assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
                inside = "r => r.left >= 0 && r.right <= innerWidth"
                boxes = "[...document.querySelectorAll('.tiles li')].map(tile => tile.getBoundingClientRect())"
                assert tab.evaluate(f"{boxes}.map({inside})") == [True] * 4
                assert len({box["x"] for box in tab.evaluate(boxes)}) == (4 if width == 1000 else 1)
                assert all(tab.evaluate("[...document.images].map(image => image.naturalWidth > 100)"))
                # on a phone, pictures are looked at in parts, since their text would be too small
                assert all(tab.evaluate("[...document.images].map(image => image.width > 450)"))
                picture = Image.open(BytesIO(tab.screenshot(full_page=True))).convert("L")
                assert len(picture.getcolors(256)) > 16
                ground = picture.getpixel((2, 2))
                assert ground > 200 if scheme == "light" else ground < 50
                tab.get_by_placeholder("layer 7").fill("layer 7")
                visible = tab.locator("#changes tbody tr:visible")
                assert visible.count() == 1
                assert "The MLP of layer 7" in visible.inner_text()
                tab.close()
        tab = browser.new_page(java_script_enabled=False)
        tab.goto(path.as_uri())
        assert tab.locator("#changes tbody tr:visible").count() == 11
        assert not tab.get_by_placeholder("layer 7").is_visible()
        tab = browser.new_page()
        tab.goto(path.as_uri())
        seen = "document.querySelector('details pre').checkVisibility()"
        assert not tab.evaluate(seen)
        tab.emulate_media(media="print")
        assert tab.evaluate(seen)
        browser.close()
