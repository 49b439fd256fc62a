"""The site that `make docs` builds: complete, strict, and at work from a folder, without asking another site."""

import dataclasses
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from helpers import BROWSER, ROOT
from playwright.sync_api import sync_playwright

import hf_layerfuse
from hf_layerfuse import recipe as recipes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as by `make docs`: any warning fails."""
    folder = tmp_path_factory.mktemp("site")
    planned = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    [options] = re.findall(r"-m sphinx (.*) -d \S+ \. \S+$", planned, flags=re.MULTILINE)
    assert {"-W", "--keep-going", "-E"} <= set(options.split())
    command = [sys.executable, "-m", "sphinx", *options.split(), "-d", str(folder / "doctrees")]
    done = subprocess.run([*command, ".", str(folder / "site")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def html(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_every_page_is_there(site):
    """Pages, the guide and the notebooks with their outputs are in the navigation, and the first page leads to them."""
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", *(ROOT / "notebooks").glob("*.ipynb")]
    first = html(site / "docs" / "index.html")
    for page in pages:
        built = page.relative_to(ROOT).with_suffix(".html")
        assert (site / built).is_file()
        assert page.name == "index.md" or f'href="{built.name}"' in first or f'href="../{built}"' in first
    for notebook in (site / "notebooks").glob("*.html"):
        assert "<img" in html(notebook), "a notebook without its plots"
    assert "url=docs/index.html" in html(site / "index.html")


def test_reference(site):
    """Every public name has an anchor, and every field of a recipe its type and default beside its name."""
    api, running = site / "docs" / "api.html", site / "docs" / "running.html"
    for name in hf_layerfuse.__all__:
        assert f'id="hf_layerfuse.{name}"' in html(api)
    shown = unescape(re.sub("<[^>]+>", "", html(api) + html(running)))
    for recipe in (recipes.Recipe, *recipes.SECTIONS.values()):
        for field in dataclasses.fields(recipe):
            if isinstance(field.default, bool | int | float):
                assert re.search(rf"\b{field.name}: [^\n]* = {re.escape(repr(field.default))}", shown), field.name


def test_pages_are_self_contained(site):
    """No script, style, font or picture comes from another site, and no markup is left over."""
    elsewhere = r"""<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)="(?:https?:)?//[^>]*>"""
    imported = r"""@import|url\(['"]?(?:https?:)?//"""
    for page in site.rglob("*.html"):
        text = html(page)
        assert not re.findall(f"{elsewhere}|{imported}", text), page
        prose = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert not re.search(r":::|```|\$|\\frac", prose), page
    for style in site.rglob("*.css"):
        assert not re.search(imported, html(style)), style
    for name in ("fusion", "collapse", "merge"):
        page = site / "docs" / f"{name}.html"
        assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in html(page)


@pytest.mark.skipif(BROWSER is None, reason="no browser found: install chromium")
def test_works_from_a_folder(site):
    """In Chromium without a server: search finds pages and fields, and formulas have a size. On a light screen, and on
    a dark phone, no script fails, nothing is requested from elsewhere, and no page is wider than the screen."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        wrong, asked = [], []
        for scheme, width in (("light", 1280), ("dark", 390)):
            tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
            tab.on("pageerror", lambda error: wrong.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            for page in sorted(site.glob("*/*.html")):
                tab.goto(page.as_uri())
                assert tab.evaluate("document.documentElement.scrollWidth") <= width, page
            tab.goto((site / "docs" / "fusion.html").as_uri())
            formula = tab.locator("math[display=block]").first
            assert formula.bounding_box()["height"] > 20
            ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 600) is (scheme == "light")
            tab.close()
        assert not wrong
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        tab = browser.new_page()
        for query, title in (("homotopy_strength", "HealRecipe.homotopy_strength"), ("telescope", "Fusion")):
            tab.goto((site / "search.html").as_uri() + f"?q={query}")
            tab.locator("#search-results li", has_text=title).first.wait_for(timeout=20_000)
        browser.close()
