"""The report of a run: one file, every curve, opened in a real browser where one is installed."""

import os
import re
import shutil
from pathlib import Path

import pytest

from m1jax.rl.report import write_report

RECORDS = [
    {"step": 0, "heldout_reward": 0.1, "heldout_accuracy": 0.05},
    *(
        {
            "step": step,
            "reward": 0.1 * step,
            "entropy": 1.0 / step,
            "kl_k3_by_update": [0.0, None, 0.01 * step],
            "length": 100.0 if step < 3 else 20.0,
            "generation_seconds": 2.0,
            **({"heldout_reward": 0.6, "heldout_accuracy": 0.5} if step == 3 else {}),
        }
        for step in (1, 2, 3)
    ),
]


@pytest.fixture
def report(tmp_path):
    (tmp_path / "samples_before.md").write_text("## `1+1=`\n- reward 0.00: `<script>alert(1)</script>`\n")
    return write_report(tmp_path, RECORDS)


def test_what_is_in_it(report):
    page = report.read_text()
    for what in ("response length (tokens)", "entropy (nats per token)", "reward", "collapsed from 100 to 20 tokens"):
        assert what in page
    assert "<td>reward</td><td>0.1</td><td>0.6</td>" in page
    assert "<script>" not in page  # samples are text
    assert "none was written" in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page.replace('xlink:href="#', "")), "it needs another file"


def test_a_run_without_records(tmp_path):
    assert "<h2>Curves</h2>" in write_report(tmp_path, []).read_text()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 340])
def test_in_a_browser(report, browser, width):
    """Nothing is fetched, nothing fails, and a telephone shows it without scrolling sideways.

    SCREENSHOTS=DIRECTORY keeps pictures to be looked at.
    """
    page, problems = browser.new_page(viewport={"width": width, "height": 800}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: problems.append(request.url) if request.url != report.as_uri() else None)
    page.goto(report.as_uri())
    assert page.locator("figure svg").count() == 6
    assert all(box["width"] > 100 for box in (f.bounding_box() for f in page.locator("figure svg").all()))
    assert "<script>alert(1)" in page.locator("pre").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.keyboard.press("End")
    page.wait_for_function("scrollY > 0")
    if directory := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(directory) / f"report-{width}.png", full_page=True)
    page.close()
    assert problems == []
