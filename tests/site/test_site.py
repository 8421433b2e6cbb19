"""The built site: its links, and what a real browser sees of it."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from scripts import load_script

from keymgmt import errors

DOCS = Path(__file__).parents[2] / "docs"
TELEPHONE, DESK = (390, 844), (1280, 900)

# What is wider than the screen; a table or a block of code that scrolls by itself may be.
TOO_WIDE = """
const width = document.documentElement.clientWidth, wide = [];
const scrolls = node => node.tagName !== "ARTICLE" &&
    (getComputedStyle(node).overflowX !== "visible" || scrolls(node.parentElement));
for (const node of document.querySelectorAll("article *")) {
    const box = node.getBoundingClientRect();
    if (box.right > width + 1 && box.width && !scrolls(node)) wide.push(node.outerHTML);
}
if (document.documentElement.scrollWidth > width) wide.push("the page itself scrolls");
return wide;
"""


@pytest.fixture(scope="module")
def pages(built) -> dict[Path, str]:
    return {file: file.read_text("utf-8") for file in sorted(built.rglob("*.html"))}


@pytest.fixture
def names(built, pages) -> list[str]:
    return [str(file.relative_to(built)) for file in pages]


def test_every_page_is_there(names):
    wanted = {str(file.relative_to(DOCS).with_suffix(".html")) for file in DOCS.rglob("*.md")}
    wanted |= {"keymgmt/sealed/SPEC.html", "CHANGELOG.html", "schemas.html", "search.html"}
    wanted |= {"commands/rewrap.html", "commands/tpm.html", "python/keymgmt_openvino.html"}
    assert wanted <= set(names)


def test_links_inside_lead_somewhere(pages):
    missing = []
    for file, text in pages.items():
        for link in set(re.findall(r'(?:href|src)="([^"]+)"', text)):
            url = urlsplit(link)
            target = (file.parent / unquote(url.path)).resolve() if url.path else file
            if url.scheme or url.netloc or not (url.path or url.fragment):
                continue
            anchor = f'id="{unquote(url.fragment)}"' if target in pages and url.fragment else ""
            if not target.exists() or anchor not in pages.get(target, ""):
                missing.append(f"{file}: {link}")
    assert not missing


def test_every_public_name_is_explained(built, pages):
    shown = {file: text for file, text in pages.items() if file.parent == built / "python"}
    assert len(shown) > 10
    anchors = {anchor for text in shown.values() for anchor in re.findall(r'id="([\w.]+)"', text)}
    for file in shown:
        exported = set(importlib.import_module(file.stem).__all__) - {"__version__"}
        left_out = {each for each in exported if f"{file.stem}.{each}" not in anchors}
        assert left_out <= set(errors.__all__), "errors are on the page of their own"


def test_no_page_is_wider_than_a_telephone(browser, names):
    browser.be(*TELEPHONE)
    too_wide = {}
    for name in names:
        browser.open(name)
        if wide := browser.run(TOO_WIDE):
            too_wide[name] = wide
    assert too_wide == {}
    assert browser.complaints() == []


def brightness(browser: Any) -> int:
    colour = browser.run("return getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


@pytest.mark.parametrize("size", [TELEPHONE, DESK])
def test_it_is_light_or_dark_as_the_reader_prefers(browser, size):
    browser.be(*size, "light")
    browser.open("index.html")
    assert brightness(browser) > 600
    browser.be(*size, "dark")
    assert brightness(browser) < 150
    browser.run("[...document.querySelectorAll('.theme-toggle')].find(e => e.offsetParent).click()")
    assert brightness(browser) > 600, "the button chooses"
    browser.run("localStorage.clear()")
    assert browser.complaints() == []


def test_the_picture_is_shown(browser):
    browser.be(*DESK)
    browser.open("index.html")
    assert browser.run("return document.querySelector('article img').clientWidth") > 500


@pytest.mark.parametrize("size", [TELEPHONE, DESK])
def test_search_finds(browser, size):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.be(*size)
    browser.open("search.html?q=rewrap")
    links = "return [...document.querySelectorAll('#search-results a')].map(each => each.href)"
    summary = "return document.querySelector('#search-results').innerText"
    WebDriverWait(browser.driver, 60).until(lambda _: "matching" in browser.run(summary))
    found = {urlsplit(link).path for link in browser.run(links)}
    assert {"/commands/rewrap.html", "/python/keymgmt.html", "/rotation.html"} <= found
    assert browser.run(TOO_WIDE) == []
    assert browser.complaints() == []


def test_the_picture_is_that_of_the_demo():
    make_demo = load_script(DOCS / "make_demo.py")
    drawn = make_demo.PICTURE.read_text("utf-8")
    assert "@font-face" not in drawn
    assert make_demo.words(drawn) == make_demo.words(make_demo.picture()), (
        "run: python docs/make_demo.py"
    )


@pytest.mark.nightly
def test_links_to_other_hosts(built, tmp_path):
    try:
        socket.getaddrinfo("github.com", 443)
    except OSError:
        if os.environ.get("CI"):
            raise
        pytest.skip("other hosts are not reached from here")
    source = os.environ["KEYMGMT_TEST_SITE_SOURCE"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-b", "linkcheck", "-q", "-c", DOCS, source, tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
