"""The Chat tab as a person meets it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser


def ask(page: Page, text: str) -> None:
    page.fill("#message textarea", text)
    page.click("#send")


def wait_finished(page: Page) -> None:
    page.wait_for_selector("table.metrics")
    page.wait_for_selector("#send:not([disabled])")


def set_max_tokens(page: Page, tokens: int) -> None:
    page.get_by_text("System prompt and sampling").click()
    page.fill("#max-new-tokens input", str(tokens))
    page.locator("#max-new-tokens input").blur()
    page.get_by_text("System prompt and sampling").click()


def column_text(page: Page, column: str) -> str:
    return page.locator(f"#{column}-chat .bot").last.inner_text() if page.locator(f"#{column}-chat .bot").count() else ""


def test_columns_stream_one_after_the_other_and_metrics_appear(page: Page) -> None:
    page.evaluate("""() => {
        const length = column => document.querySelector(`#${column}-chat .bot`)?.innerText.length ?? 0;
        window.lengths = [];
        const note = () => window.lengths.push([length("baseline"), length("fused")]);
        for (const column of ["baseline", "fused"])
            new MutationObserver(note).observe(document.querySelector(`#${column}-chat`), {subtree: true, childList: true, characterData: true});
    }""")
    ask(page, "What is artificial intelligence?")
    wait_finished(page)
    lengths = [(a, b) for a, b in page.evaluate("window.lengths") if a or b]
    final_baseline, final_fused = lengths[-1]
    assert [a for a, _ in lengths if 0 < a < final_baseline], "the baseline did not stream"
    while_fused_grew = [a for a, b in lengths if 0 < b < final_fused]
    assert while_fused_grew and all(a == final_baseline for a in while_fused_grew), "the columns overlapped"
    cells = page.locator('tr[data-metric="decode_tok_s"] td').all_inner_texts()
    assert re.match(r"[\d.,]+ tok/s", cells[0]) and re.match(r"[\d.,]+ tok/s", cells[1])
    expect(page.locator("#latency .js-plotly-plot")).to_have_count(1)
    assert "bnb_int8" in page.locator("#report").inner_text()


def test_stop_halts_within_a_second(page: Page) -> None:
    set_max_tokens(page, 1500)
    ask(page, "Explain quantum mechanics in simple terms.")
    page.wait_for_function("document.querySelector('#baseline-chat .bot')?.innerText.length > 10")
    page.click("#stop")
    began = time.monotonic()
    page.wait_for_selector("#send:not([disabled])")
    assert time.monotonic() - began < 1.0
    before = column_text(page, "baseline")
    page.wait_for_timeout(700)
    assert column_text(page, "baseline") == before != ""


def test_markup_is_shown_and_not_run(page: Page) -> None:
    requests: list[str] = []
    page.on("request", lambda r: requests.append(r.url))
    set_max_tokens(page, 4)
    attack = '<script>window.pwned=1</script><img src="http://canary.invalid/x" onerror="window.pwned=2"> ![a](http://canary.invalid/y) [b](javascript:alert(1))'
    ask(page, attack)
    wait_finished(page)
    assert page.evaluate("window.pwned") is None
    assert "<script>window.pwned=1</script>" in page.locator("#baseline-chat .user").first.inner_text()
    assert not [r for r in requests if "canary.invalid" in r]


def test_second_turn_regenerate_undo_and_clear(page: Page) -> None:
    set_max_tokens(page, 6)
    ask(page, "What is gravity?")
    wait_finished(page)
    ask(page, "Who discovered it?")
    expect(page.locator("#baseline-chat .user")).to_have_count(2)
    page.wait_for_selector("#send:not([disabled])")
    first = column_text(page, "baseline")
    page.click("#regenerate")
    page.wait_for_selector("#stop:not([disabled])")
    page.wait_for_selector("#send:not([disabled])")
    expect(page.locator("#baseline-chat .user")).to_have_count(2)
    assert column_text(page, "baseline") == first  # greedy
    page.click("#undo")
    expect(page.locator("#baseline-chat .user")).to_have_count(1)
    expect(page.locator("#message textarea")).to_have_value("Who discovered it?")
    page.click("#clear")
    expect(page.locator("#baseline-chat .user")).to_have_count(0)
    expect(page.locator("#fused-chat .user")).to_have_count(0)


def test_export_gives_the_metrics_that_are_shown(page: Page, tmp_path: Path) -> None:
    set_max_tokens(page, 8)
    ask(page, "What is a cloud?")
    wait_finished(page)
    page.wait_for_function("!document.querySelector('#export-json').disabled")
    with page.expect_download() as waiting:
        page.click("#export-json")
    waiting.value.save_as(tmp_path / "chat.json")
    record = json.loads((tmp_path / "chat.json").read_text())
    assert set(record["answers"]) == {"baseline", "bnb_int8"}
    assert record["answers"]["baseline"]["metrics"]["output_tokens"] == int(page.locator('tr[data-metric="output_tokens"] td').first.inner_text())
    assert record["provenance"]["packages"]["torch"]


def test_bad_values_are_said_in_the_columns_and_the_next_question_works(page: Page) -> None:
    set_max_tokens(page, 0)
    ask(page, "What is a cloud?")
    expect(page.locator("#baseline-chat")).to_contain_text("max_new_tokens is 0")
    set_max_tokens(page, 5)
    ask(page, "What is a cloud?")
    wait_finished(page)
    assert column_text(page, "baseline")


def test_empty_question_is_refused_in_words(page: Page) -> None:
    ask(page, "   ")
    expect(page.locator("#baseline-chat")).to_contain_text("The message is empty")


def test_switches_show_options_and_the_equal_command(page: Page) -> None:
    page.locator("#switch-word_removal input").check()
    expect(page.locator(".option-every:visible")).to_have_count(1)
    expect(page.locator("#command")).to_contain_text("word_removal+bnb_int8")
    page.locator("#switch-bnb_nf4 input").check()
    ask(page, "What is a cloud?")
    expect(page.locator("#fused-chat")).to_contain_text("do not go together")


def test_keyboard_alone_asks_a_question(page: Page) -> None:
    set_max_tokens(page, 5)
    page.focus("#message textarea")
    page.keyboard.type("What is rain?")
    page.keyboard.press("Enter")
    wait_finished(page)
    assert column_text(page, "fused")


@pytest.mark.parametrize("width", [390, 800, 1360])
def test_page_fits_its_width(page: Page, width: int) -> None:
    set_max_tokens(page, 5)
    ask(page, "What is rain?")
    wait_finished(page)
    page.set_viewport_size({"width": width, "height": 844})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width + 1
