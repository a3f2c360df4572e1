"""The HTML report: well formed, fetches nothing, runs nothing, and shows what the record holds."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from engines.compare_figures.scale import scale_of
from engines.compare_report import report_html, write_report
from engines.compare_report.sections import SHOWN
from engines.metric_groups import GROUPS
from tests.engines.compare_records import DEFINITIONS, make_record

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
ATTACK = '<script>alert("x")</script><img src=http://evil.example onerror=alert(1)>'


class Checker(HTMLParser):
    """Tags closed in order; every attribute and all text collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        self.ids += [v or "" for k, v in attrs if k == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


FULL = make_record(methods=("baseline", "int8", "larosa", "all_combined", "chai", "mpo"), repeats=2, failing={"chai": "not built"}, one_fails=("int8",), pending=("mpo",), unmeasured={"larosa": ("rouge_l",)})
PAGE = report_html(FULL)


@pytest.fixture(scope="module")
def attacked() -> str:
    record = make_record(
        methods=("baseline", "int8", ATTACK), failing={ATTACK: ATTACK}, models=("embedded", ATTACK), texts={("baseline", "q0"): "safe " + ATTACK, ("int8", "q0"): "other " + ATTACK},
    )
    record["queries"][0]["question"] = ATTACK * 3
    record["queries"][0]["keywords"] = [ATTACK]
    record["settings"][ATTACK] = ATTACK
    record["provenance"]["cpu"] = ATTACK
    record["methods"][1]["excluded"] = {ATTACK: ATTACK}
    record["definitions"] = {**DEFINITIONS, "ttft_s": {"definition": ATTACK, "unit": "s", "better": "low", "title": ATTACK}}
    for cell in record["cells"]:
        for report in cell["reports"]:
            report.update(notes=[ATTACK], label=ATTACK, technique=ATTACK)
    return report_html(record)


@pytest.mark.parametrize("record", [FULL, make_record(methods=("baseline",), queries=1), make_record(models=("a", "b/c", "d")), {"models": []}, {}], ids=["all states", "one method", "three models", "no model", "nothing"])
def test_page_is_well_formed_and_fetches_nothing(record: dict[str, Any]) -> None:
    page = check(report_html(record))
    links = [(tag, k, v) for tag, k, v in page.attributes if k in ("src", "href", "xlink:href", "action", "srcset", "data")]
    assert all(v.startswith("#") for _, _, v in links)
    assert {v for _, _, v in links if v.startswith("#model") or v in ("#labels", "#settings")} <= {f"#{i}" for i in page.ids}
    assert not [a for a in page.attributes if "http" in a[2] and not a[1].startswith("xmlns")]
    assert not re.search(r"@import|url\((?!#)", report_html(record))
    assert len(page.ids) == len(set(page.ids))
    assert "nan" not in {t.strip().lower() for t in page.text}


def test_references_inside_figures_point_to_their_own_definitions() -> None:
    ids = set(check(PAGE).ids)
    wanted = set(re.findall(r"url\(#([^)]+)\)", PAGE)) | set(re.findall(r'xlink:href="#([^"]+)"', PAGE))
    assert wanted
    assert wanted <= ids


def test_nothing_from_texts_names_errors_or_settings_becomes_markup(attacked: str) -> None:
    page = check(attacked)
    assert "<script" not in attacked
    assert "<img" not in attacked
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert "alert" in " ".join(page.text)


def test_policy_forbids_fetching_and_scripts() -> None:
    policy = next(v for tag, k, v in check(PAGE).attributes if tag == "meta" and k == "content" and "default-src" in v)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def cells_of_tables(html: str) -> list[str]:
    return [unescape(re.sub(r"<[^>]+>", " ", c)).strip() for c in re.findall(r"<td[^>]*>(.*?)</td>", html, flags=re.DOTALL)]


def test_tables_show_exactly_the_rows_medians_and_spreads() -> None:
    record = make_record(methods=("baseline", "int8"), repeats=3)
    wanted = []
    for metrics in GROUPS.values():
        for row in record["rows"]:
            for name in [m for m in metrics if any(m in r["metrics"] for r in record["rows"])]:
                scale = scale_of([r["metrics"][name]["median"] for r in record["rows"]], DEFINITIONS[name]["unit"])
                median, p10, p90 = (scale.text(row["metrics"][name][k]) for k in ("median", "p10", "p90"))
                wanted.append(median if p10 == p90 else f"{median} {p10} to {p90}")
    assert [" ".join(c.split()) for c in cells_of_tables(report_html(record))] == wanted


def test_missing_values_failures_and_waiting_methods_are_words() -> None:
    cells = cells_of_tables(PAGE)
    assert {"not measured", "failed", "waiting"} <= set(cells)
    text = " ".join(check(PAGE).text)
    assert "chai failed: not built." in text
    assert "int8: 1 of 4 answers failed: Memory ran out while answering." in text
    assert "This comparison is not finished" in text


def test_tooltips_hold_the_definitions() -> None:
    titles = [v for tag, k, v in check(PAGE).attributes if k == "title"]
    assert any(DEFINITIONS["ttft_s"]["definition"] in t for t in titles)
    assert any("Held smaller in memory" in t for t in titles)


def test_every_figure_is_drawn_once_a_model_and_the_cross_model_one_once() -> None:
    assert PAGE.count("<svg ") == len(SHOWN)
    record = make_record(methods=("baseline", "int8"), models=("a", "b"), queries=1)
    html = report_html(record)
    assert html.count("<svg ") == 2 * len(SHOWN) + 1
    assert [i for i in check(html).ids if i in ("across", "model-1", "model-2", "labels", "settings")] == ["across", "model-1", "model-2", "labels", "settings"]


def test_figures_follow_the_mode_of_the_page() -> None:
    svg = PAGE[PAGE.index("<svg ") : PAGE.rindex("</svg>")].lower()
    assert "var(--ink)" in svg
    assert not re.search("#1b2430|#5b6573|#ffffff", svg)
    assert "prefers-color-scheme: dark" in PAGE


def test_answers_stand_side_by_side_with_differences_marked() -> None:
    record = make_record(methods=("baseline", "int8", "larosa"), queries=1, texts={("baseline", "q0"): "cats like milk", ("int8", "q0"): "cats hate milk", ("larosa", "q0"): "cats like milk"})
    html = report_html(record)
    assert "cats <del>like</del><ins>hate</ins> milk" in html
    assert html.count("cats like milk</div>") == 1
    assert "the baseline&#x27;s answer, character by character" in html or "the baseline's answer, character by character" in html


def test_settings_provenance_and_compositions_are_complete() -> None:
    text = " ".join(check(PAGE).text)
    for value in ("AMD EPYC", "torch 2.13.0", "abc+", "larosa+vattention", "bnb_int8: replaces the same weights as int8", "ffa7157f"):
        assert value in text, value


def test_report_is_written_whole(tmp_path: Path) -> None:
    record = make_record(methods=("baseline",), queries=1, texts={("baseline", "q0"): "a lone surrogate \ud800 and 人"})
    path = tmp_path / "new" / "report.html"
    write_report(record, path)
    html = path.read_text(encoding="utf-8")
    check(html)
    assert "人" in html
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
