"""The page in a real browser: turning a dial changes the candidates and says why; all of it by keyboard."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from playwright.sync_api import Page, expect, sync_playwright

pytestmark = pytest.mark.e2e

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# no sandbox: a container's root has none to offer; the rest keeps the browser from calling home
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update --disable-sync"
FLAGS += " --disable-background-networking"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(saved_model, tiny_data, two_tower):
    """Where `pinrec demo` serves the tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", saved_model, "--data", tiny_data, "--compare", two_tower, "--port", port]
    with subprocess.Popen([sys.executable, "-m", "pinrec_hf", "demo", *map(str, words)]) as server:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(600):
            try:
                urllib.request.urlopen(address).close()
                break
            except urllib.error.URLError:
                assert server.poll() is None, "pinrec demo has ended"
                time.sleep(0.2)
        yield address
        server.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail("REQUIRE_BROWSER is set and there is no chromium: install the package chromium")
        pytest.skip("no chromium here: install the package chromium to see the page tested")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """`open_page(size)`: the page with its first list; afterwards, that all it asked for came from its own server."""
    contexts, asked = [], []

    def open_page(size=WIDE) -> Page:
        contexts.append(browser.new_context(viewport=size))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address, wait_until="domcontentloaded")
        expect(page.locator("#candidates li")).to_have_count(10, timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def items(page: Page, which: str = "#candidates") -> list[str]:
    return [item.get_attribute("data-item") for item in page.locator(f"{which} li").all()]


def dial(page: Page, outcome: str):
    return page.get_by_role("slider", name=f"{outcome}, % of the slots")


def said(page: Page) -> str:
    return page.locator("#why").inner_text()


def test_turning_the_dial_changes_the_candidates_and_the_page_says_why(open_page):
    page = open_page()
    before, beside = items(page), items(page, "#compared")
    assert "new against the last list" not in said(page)
    dial(page, "save").focus()
    page.keyboard.press("End")
    expect(page.locator("#why")).to_contain_text("new against the last list", timeout=30_000)
    expect(dial(page, "click")).to_have_value("0")
    after, why = items(page), said(page)
    assert after != before
    new = len(set(after) - set(before))
    assert f"{new} new against the last list" in why
    assert page.locator("#candidates .badge").count() == new > 0
    assert re.search(r"save \d+% → 100%", why)
    assert "10 of 10 come from save (100% asked for)" in why
    assert page.locator("#candidates .chip").all_inner_texts() == ["save"] * 10
    assert items(page, "#compared") == beside
    assert page.locator("#path svg[role=img]").count() == 1
    region = page.locator("#why [aria-live=polite][role=status]")
    assert "new against the last list" in region.inner_text()


def test_everything_is_reached_and_a_history_is_written_by_keyboard_alone(open_page):
    page = open_page()
    name = """() => {
        const e = document.activeElement;
        return e.ariaLabel || [...(e.labels || [])].map(l => l.innerText).join(" ") || e.innerText;
    }"""
    page.get_by_label("User").focus()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(name).strip())
        if reached[-1].startswith("Add to the history"):
            break
    wanted = ["homefeed", "search", "related", "Search query", "Look beside"]
    wanted += [f"range slider for {label}" for label in ("Steps ahead", "Candidates")]
    wanted += [f"range slider for {outcome}, % of the slots" for outcome in ("click", "save")]
    assert set(wanted) <= set(reached), reached
    assert all(reached), reached  # nothing on the way without a name
    page.keyboard.type("of p4")
    found = page.get_by_role("radio", name="Title of p4", exact=True)
    expect(found).to_be_checked(timeout=30_000)
    add = page.get_by_role("button", name="Add as save")
    expect(add).to_be_enabled()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate(name).strip() == "Add as save":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#history li .title").first).to_have_text("Title of p4", timeout=30_000)
    assert re.search(r"History \d+ → \d+ events", said(page))
    assert "p4" not in items(page)


def test_an_empty_history_a_query_and_a_mistake_are_answered(open_page):
    page = open_page()
    user = page.get_by_label("User")
    user.fill("nobody at all")
    page.keyboard.press("Enter")
    expect(page.get_by_text("is in no split")).to_be_visible(timeout=30_000)
    assert "newcomer" not in page.locator("#history").inner_text()  # the last answer stands
    user.fill("Nobody")
    page.get_by_role("option", name="Nobody").click()
    expect(page.locator("#history")).to_contain_text("the list is for a newcomer", timeout=30_000)
    page.get_by_role("radio", name="search").check()
    expect(page.locator("#why")).to_contain_text("Surface homefeed → search", timeout=30_000)
    page.get_by_label("Search query").fill("blue sofa")
    page.keyboard.press("Enter")
    expect(page.locator("#why")).to_contain_text("Query none → “blue sofa”", timeout=30_000)


def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page):
    page = open_page(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    tops = [
        page.locator(part).bounding_box()["y"] for part in ("#controls", "#why", "#candidates", "#compared", "#path")
    ]
    assert tops == sorted(tops)
    for part in ("#controls", "#why", "#candidates", "#compared", "#path svg", "#history"):
        box = page.locator(part).bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= PHONE["width"]
        assert box["width"] > 300
    sizes = page.evaluate(
        "[...document.querySelectorAll('#results *')].filter(e => e.children.length == 0 && e.innerText)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
