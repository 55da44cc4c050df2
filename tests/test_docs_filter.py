"""The filter of long tables in the documentation, in headless Chromium."""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)


def test_the_site_has_the_filter() -> None:
    assert "extra_javascript:\n  - filter.js\n" in (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_rows_stay_that_hold_every_word(tmp_path: Path) -> None:
    names = [f"<tr><td>type {n}</td><td>{'Hooks only' if n % 2 else 'exact'}</td></tr>" for n in range(30)]
    tables = (
        f"<table><thead><tr><th>type</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        for rows in (names, names[:5])
    )
    page_file = tmp_path / "page.html"
    page_file.write_text(f"<body>{''.join(tables)}<script src='{(DOCS / 'filter.js').as_uri()}'></script>")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(page_file.as_uri())
        # The short table needs none.
        assert page.locator("input").count() == 1
        assert page.locator("output").inner_text() == "30 of 30 rows"
        page.get_by_label("Filter").fill("hooks 2")
        shown = page.locator("table").first.locator("tbody tr:visible td:first-child").all_inner_texts()
        assert shown == ["type 21", "type 23", "type 25", "type 27", "type 29"]
        assert page.locator("output").inner_text() == "5 of 30 rows"
        page.get_by_label("Filter").fill("")
        assert page.locator("tbody tr:visible").count() == 35
        browser.close()
