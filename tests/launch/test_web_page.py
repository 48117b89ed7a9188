"""The web page in a real browser: send, stream, compare, vote; and the file of votes."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
from helpers import PROJECT, make_model

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if BROWSER else ["a Chromium browser (apt-get install chromium)"]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
HINT = "Write a message; Enter sends it"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A page with two models that know nothing: (its address, its file of votes)."""
    root = tmp_path_factory.mktemp("served")
    paths = [make_model(root / f"model{seed}", seed=seed) for seed in (1, 2)]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    votes, log = root / "votes.jsonl", (root / "log").open("w+")
    flags = ["--votes", votes, "--port", port, "--device", "cpu", "--max_new_tokens", "40", "--greedy"]
    command = [sys.executable, PROJECT / "inference/serve.py", "--path", *paths, *flags]
    server = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (root / "log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", votes
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def send(page, text):
    page.get_by_placeholder(HINT).fill(text)
    page.get_by_placeholder(HINT).press("Enter")


def bubbles(page, side):
    """What the user and the model said on one side, in order."""
    return [text.strip() for text in page.locator(f"#side-{side} .message").all_inner_texts()]


def place_of(page, selector) -> dict[str, float]:
    """left, right, top and bottom of an element, in pixels of the window."""
    box = page.locator(selector).bounding_box()
    return dict(left=box["x"], right=box["x"] + box["width"], top=box["y"], bottom=box["y"] + box["height"])


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
def test_the_page_fits_its_window(width, height, served, browser, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(served[0])
    page.get_by_placeholder(HINT).wait_for(timeout=60_000)

    def check(name):
        page.screenshot(path=tmp_path / f"{name}_{width}.png")  # to look at
        size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight, scrollY]")
        assert size == [width, height, 0]  # nothing to scroll, and nothing was
        one, other, box = (place_of(page, selector) for selector in ("#side-A", "#side-B", "textarea"))
        new = page.get_by_role("button", name="New").bounding_box()
        assert max(box["bottom"], new["y"] + new["height"]) <= height
        assert min(side["bottom"] - side["top"] for side in (one, other)) > height / 5
        if width > 700:  # side by side, over most of the window
            assert one["top"] == other["top"] and one["right"] < other["left"]
            assert other["right"] - one["left"] > 0.8 * width
        else:
            assert one["bottom"] < other["top"] and one["right"] - one["left"] > 0.9 * width

    check("open")
    send(page, "say red")
    page.get_by_text("Which answer is better?").wait_for(timeout=60_000)
    check("answered")


def test_two_models_are_asked_compared_and_voted_on(served, browser):
    address, votes = served
    page, other = browser.new_page(), browser.new_context().new_page()
    asked_for = []
    page.on("request", lambda request: asked_for.append(urlsplit(request.url)))
    for tab in (page, other):
        tab.goto(address)
        tab.get_by_placeholder(HINT).wait_for(timeout=60_000)
    better = page.get_by_role("button", name="B is better")
    assert better.is_disabled()

    send(page, "  ")
    page.get_by_text("Write a message first.").wait_for()
    send(page, "say <i>red</i>")
    page.get_by_text("Which answer is better?").wait_for(timeout=60_000)
    answers = {side: bubbles(page, side)[-1] for side in "AB"}
    assert bubbles(page, "A")[0] == bubbles(page, "B")[0] == "say <i>red</i>"  # as text, not as HTML
    assert answers["A"] != answers["B"]
    assert page.get_by_placeholder(HINT).input_value() == ""
    assert "model" not in page.locator("body").inner_text().replace("Compare two models", "")  # blind

    better.click()
    page.get_by_text("B is better: row 1").wait_for()
    assert "A was" in page.locator("#status").inner_text() and better.is_disabled()
    [row] = [json.loads(line) for line in votes.read_text().splitlines()]
    assert row["prompt"] == [{"role": "user", "content": "say <i>red</i>"}]
    for name, side in (("chosen", "B"), ("rejected", "A")):
        [answer] = row[name]
        assert answer["role"] == "assistant"
        assert " ".join(answer["content"].split()) == " ".join(answers[side].split())
    assert bubbles(page, "A")[-1] == answers["B"]  # the better answer goes on on both sides

    assert bubbles(other, "A") == []  # another tab, another conversation
    page.get_by_role("button", name="New").click()
    page.locator("#side-A .message").first.wait_for(state="detached")
    hosts = {url.hostname for url in asked_for if url.scheme in ("http", "https", "ws")}
    assert hosts == {"127.0.0.1"}
