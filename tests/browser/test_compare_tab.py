"""The Compare tab as a person meets it."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

CSV = "id,question,keywords\nrain,What is rain?,water;cloud\nsum,=1+1 is what?,\n"
MORE = "".join(f"{name},What is {name}?,\n" for name in ("snow", "wind", "light", "heat", "sound", "ice"))  # enough answers to be seen one after the other on a busy machine


@pytest.fixture
def tab(page: Page) -> Page:
    """The tab, with nothing but word removal chosen beside the baseline."""
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_selector("#compare-run:visible")
    for title in ("int8 weights", "int8 weights (bitsandbytes)", "Native CPU runtime"):
        page.locator("#compare-methods").get_by_label(title, exact=True).uncheck()
    page.locator("#compare-methods").get_by_label("Word removal").check()
    page.fill("#compare-combinations textarea, #compare-combinations input", "")
    return page


def upload(page: Page, folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    page.get_by_label("my file").check()
    page.set_input_files("#compare-upload input[type=file]", folder / name)


def run(page: Page) -> None:
    page.click("#compare-run")
    page.wait_for_selector('.compare-status[data-state="working"]')
    page.wait_for_selector('.compare-status[data-state="done"]', timeout=90_000)


def cell(page: Page, method: str, place: int) -> str:
    return page.locator(f'#compare-table tr[data-method="{method}"] td').nth(place).inner_text()


def downloaded(page: Page, button: str) -> bytes:
    page.wait_for_function(f"!document.querySelector('#{button}').disabled", timeout=60_000)
    with page.expect_download() as waiting:
        page.click(f"#{button}")
    return Path(waiting.value.path()).read_bytes()


def test_own_queries_two_methods_the_table_fills_and_the_files_say_the_same(tab: Page, tmp_path: Path) -> None:
    upload(tab, tmp_path, "mine.csv", CSV + MORE)
    expect(tab.locator("#compare-preview")).to_contain_text("8 queries read")
    tab.evaluate("""() => {
        window.filled = [];
        const note = () => window.filled.push([...document.querySelectorAll('#compare-table tbody td')].filter(td => /tok\\/s/.test(td.innerText)).length);
        new MutationObserver(note).observe(document.querySelector('#compare-table'), {subtree: true, childList: true, characterData: true});
    }""")
    run(tab)
    counts = tab.evaluate("window.filled")
    assert len(set(counts)) >= 3 and counts == sorted(counts), counts  # not all at once
    record: dict[str, Any] = json.loads(downloaded(tab, "compare-json"))
    assert record["complete"] and [q["question"] for q in record["queries"]][:3] == ["What is rain?", "=1+1 is what?", "What is snow?"]
    assert [r["method"] for r in record["rows"]] == ["baseline", "word_removal"]
    for place, method in enumerate(("baseline", "word_removal")):
        for query, key in enumerate(("rain", "sum")):
            value = next(c for c in record["cells"] if (c["method"], c["query"]) == (method, key))["metrics"]["decode_tok_s"]
            shown = cell(tab, method, 2 + query)
            assert float(shown.split()[0].replace(",", "")) == pytest.approx(value, rel=0.01), (place, shown)
        median = next(r for r in record["rows"] if r["method"] == method)["metrics"]["decode_tok_s"]["median"]
        assert float(cell(tab, method, 0).split()[0].replace(",", "")) == pytest.approx(median, rel=0.01)
    table = downloaded(tab, "compare-csv").decode("utf-8-sig")
    assert "'=1+1 is what?" in table
    with zipfile.ZipFile(io.BytesIO(downloaded(tab, "compare-figures"))) as pictures:
        names = pictures.namelist()
        assert {"time_metrics.png", "pareto.png", "output_lengths.png", "quality_comparison.png"} <= set(names)
        assert all(pictures.read(name).startswith(b"\x89PNG") for name in names)
    assert b"<!DOCTYPE html>" in downloaded(tab, "compare-report")
    expect(tab.locator("#compare-figure-pareto .js-plotly-plot")).to_have_count(1)
    expect(tab.locator("#compare-advice .advice-head")).to_contain_text("Take")


def test_answers_metric_and_limits_are_looked_at_without_a_new_run(tab: Page) -> None:
    run(tab)
    tab.get_by_label("Answers to").click()
    tab.get_by_role("option").filter(has_text="explanation").click()
    expect(tab.locator("#compare-answers article")).not_to_have_count(0)
    tab.get_by_label("Shown in the table").click()
    tab.get_by_role("option").filter(has_text="Output tokens").click()
    expect(tab.locator("#compare-table caption")).to_have_text("Output tokens")
    assert re.fullmatch(r"\d+", cell(tab, "baseline", 2))
    tab.get_by_text("Your limits").click()
    tab.fill("#limit-speed input", "1000000")
    tab.locator("#limit-speed input").blur()
    expect(tab.locator("#compare-advice .advice-head")).to_contain_text("No method")
    expect(tab.locator("#compare-command")).to_contain_text("cli.py compare --quick --methods baseline word_removal")


def test_a_file_that_is_none_is_said_with_its_line_and_nothing_runs(tab: Page, tmp_path: Path) -> None:
    upload(tab, tmp_path, "bad.csv", "text,answer\nWhat is rain?,water\n")
    expect(tab.locator("#compare-preview")).to_contain_text("bad.csv, line 1")
    tab.click("#compare-run")
    expect(tab.locator('.compare-status[data-state="failed"]')).to_contain_text("no query of your own yet")
    upload(tab, tmp_path, "good.txt", "What is rain?\n")
    expect(tab.locator("#compare-preview")).to_contain_text("1 query read")
    run(tab)


def test_stop_keeps_what_is_done_and_run_goes_on_from_there(tab: Page) -> None:
    tab.get_by_text("How to measure").click()
    tab.fill("#compare-repeats input", "3")
    tab.locator("#compare-repeats input").blur()
    tab.click("#compare-run")
    tab.wait_for_function("[...document.querySelectorAll('#compare-table tbody td')].filter(td => /tok\\/s/.test(td.innerText)).length > 6", timeout=60_000)
    tab.click("#compare-stop")
    tab.wait_for_selector('.compare-status[data-state="stopped"]', timeout=5_000)
    first = cell(tab, "baseline", 2)
    tab.reload()  # the page is gone, what was measured is not
    tab.get_by_role("tab", name="Compare").click()
    tab.wait_for_selector('.compare-status[data-state="stopped"]')
    assert cell(tab, "baseline", 2) == first


@pytest.mark.parametrize("width", [390, 800, 1360])
def test_page_fits_its_width(tab: Page, tmp_path: Path, width: int) -> None:
    upload(tab, tmp_path, "one.txt", "What is rain?\n")
    expect(tab.locator("#compare-preview")).to_contain_text("1 query read")
    run(tab)
    tab.set_viewport_size({"width": width, "height": 844})
    tab.wait_for_timeout(500)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width + 1
