"""The page in a real browser: keyboard alone, what it shows, contexts, a dropped file, errors."""

from __future__ import annotations

import shutil

import pytest
from serve_cases import TEXT, serving, small_model

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    found = browser.new_page()
    errors = []
    found.on("pageerror", lambda error: errors.append(str(error)))
    yield found
    assert not errors
    found.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store"), model=small_model(), name="mill") as found:
        yield found


def say(page, text):
    """As from the keyboard."""
    count = page.locator("#talk .assistant").count()
    page.focus("#say")
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.wait_for_function(f"document.querySelectorAll('#talk .assistant').length == {count + 1}")
    page.wait_for_selector("#send:enabled", timeout=30_000)
    return page.locator("#talk .assistant").last.text_content()


def test_chat_by_keyboard(page, server):
    page.goto(server[0])
    page.wait_for_function("document.querySelector('#model').textContent == 'mill'")  # asked for once the page is there
    page.fill("#temperature", "0")
    page.fill("#limit", "20")
    first = say(page, "The mill")
    assert first
    facts = page.locator("#facts").text_content()
    assert "tokens/s" in facts and "miss:" in facts and "in the same memory" in facts
    assert page.locator("#talk .user").last.text_content() == "The mill"
    page.click("#clear")
    assert say(page, "The mill") == first  # greedy: the same conversation again
    page.focus("#say")
    for _ in range(2):  # to Send and, past Stop, to New
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"


def test_a_file_is_read_and_asked_forked_and_undone(page, server, tmp_path):
    (tmp_path / "A mill, by night.txt").write_text(TEXT * 3)
    page.goto(server[0])
    page.fill("#limit", "8")
    page.set_input_files("#file", tmp_path / "A mill, by night.txt")
    page.wait_for_selector("input[name=context][value='A-mill-by-night']:checked", timeout=60_000)
    assert "tokens read" in page.locator("#reading").text_content()
    store = server[1].store("")
    before = store.entry("A-mill-by-night").id
    say(page, "And then?")
    assert "hit: context" in page.locator("#facts").text_content()
    page.wait_for_function("document.querySelector('#contexts').textContent.includes('2 versions')")
    page.on("dialog", lambda dialog: dialog.accept("draft") if dialog.type == "prompt" else dialog.accept())
    page.click("#fork")
    page.wait_for_selector("input[name=context][value=draft]:checked")
    page.click("#undo")
    page.wait_for_function("document.querySelector('#talk').childElementCount == 0")
    page.wait_for_timeout(300)
    assert store.entry("draft").id == before != store.entry("A-mill-by-night").id
    page.click("#remove")
    page.wait_for_selector("input[name=context][value=draft]", state="detached")


def test_errors_are_told(page, tmp_path):
    with serving(tmp_path, model=small_model(), keys=("secret",)) as (url, _):
        page.goto(url)
        page.wait_for_function("document.querySelector('#error').textContent.includes('no API key')")
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        page.wait_for_function("document.querySelector('#error').textContent == ''")
        page.wait_for_selector("input[name=context]")
        page.fill("#limit", "0")
        say(page, "x")
        assert "max_tokens" in page.locator("#error").text_content()


def test_everything_has_a_name_for_a_screen_reader(page, server):
    page.goto(server[0])
    page.wait_for_selector("input[name=context]")
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, textarea, progress')].filter((e) => !e.textContent.trim()
        && !e.getAttribute('aria-label') && !(e.labels && e.labels.length)).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("[role=log][aria-live=polite]").count() == 1 and page.locator("[role=alert]").count() == 1
