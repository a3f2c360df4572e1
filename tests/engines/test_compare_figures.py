"""Figures of a comparison: what they show is what the record holds; nothing is zero that was not measured."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from engines.compare_figures.all_methods import shade
from engines.compare_figures.bar_figures import ALL_NINE, QUALITY, TIME
from engines.compare_figures.files import CROSS_MODEL, FIGURES, draw, draw_cross_model, model_slugs, write_figures
from engines.compare_figures.names import name_lines, shortened
from engines.compare_figures.page import PAGE_FIGURES, axis_names, page_figures
from engines.compare_figures.pairs import marked_words
from engines.compare_figures.scale import axis_limit, scale_of
from engines.compare_view import ModelView, Spread, model_view, model_views
from engines.pareto import front, points
from tests.engines.compare_records import THIRTEEN, make_record

MANY = make_record(
    methods=THIRTEEN, queries=2, repeats=2, failing={"bnb_int8": "The bitsandbytes package is not installed."}, one_fails=("int4",), pending=("chai",),
    unmeasured={"mpo": ("keyword_recall", "ttft_s", "weights_in_use_bytes")},
)
LONE = make_record(methods=("baseline",), queries=1)
EMPTY = {"format": 1, "models": [{"model_id": "embedded"}], "methods": [{"method": "baseline"}, {"method": "int8"}], "queries": [], "cells": [], "rows": [], "complete": False}
NASTY = make_record(
    methods=("baseline", "int8", "<script>$x_1$</script>", "+".join(f"larosa:sparsity=0.{n}" for n in range(1, 9)), "+".join(f"larosa:sparsity=0.{n}" for n in range(1, 10))),
    texts={("baseline", "q0"): "plain words", ("int8", "q0"): "$\\frac{1}{0}$ 人工智能 \x00 <b>" + "x" * 3000, ("baseline", "q1"): ""}, figures={"int8": {"decode_tok_s": 1e9, "agreement_share": 0.0}},
)


def view_of(record: dict[str, Any]) -> ModelView:
    view = model_view(record)
    assert view is not None
    return view


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def numbers(figure: Figure) -> Iterator[float]:
    for axes in figure.axes:
        yield from (*axes.get_xlim(), *axes.get_ylim())
        for patch in axes.patches:
            yield from (patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height())  # type: ignore[attr-defined]
        for line in axes.lines:
            yield from np.asarray(line.get_xydata(), dtype=float).ravel()
        for points_ in axes.collections:
            yield from np.asarray(points_.get_offsets(), dtype=float).ravel()


def bars(axes: Any) -> dict[int, float]:
    """Row -> length of its bar."""
    return {round(p.get_y() + p.get_height() / 2): p.get_width() for p in axes.patches if isinstance(p, Rectangle)}


@pytest.mark.parametrize("record", [MANY, LONE, EMPTY, NASTY], ids=["thirteen methods", "baseline alone", "nothing yet", "nasty texts"])
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_of_every_record_is_finite_and_is_drawn(record: dict[str, Any], name: str, tmp_path: Path) -> None:
    figure = draw(name, view_of(record))
    assert all(math.isfinite(n) for n in numbers(figure))
    figure.canvas.draw()
    assert not any(re.search(r"\bnan\b|\binf\b", t) for t in texts(figure))
    assert figure.get_figwidth() * 72 == pytest.approx(331)


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_smaller_than_a_phone_can_show(name: str) -> None:
    sizes = {t.get_fontsize() for t in draw(name, view_of(MANY)).findobj(Text) if t.get_text() not in ("", "▴", "▾")}
    assert min(sizes) >= 6.5  # points of a 331 point sheet, which is 1.09 times as many pixels on a phone of 360


def test_bars_are_the_medians_sorted_with_the_baseline_first() -> None:
    view = view_of(MANY)
    figure = draw("time_metrics", view)
    order = view.sorted_methods("tpot_median_s")
    assert order[0] == "baseline"
    rest = [s.median for m in order[1:] if (s := view.spread(m, "tpot_median_s"))]
    assert rest == sorted(rest)
    for axes, metric in zip(figure.axes, [m for row in TIME for m in row], strict=True):
        scale = scale_of([r.metrics[metric].median for r in view.rows if metric in r.metrics], "tok/s" if "tok" in metric and metric.endswith("tok_s") else "s")
        wanted = {y: s.median / scale.divisor for y, m in enumerate(order) if (s := view.spread(m, metric))}
        assert bars(axes) == pytest.approx(wanted)


def test_error_bars_run_from_the_10th_to_the_90th_percentile_and_the_baseline_is_a_line() -> None:
    view = view_of(MANY)
    axes = draw("quality_comparison", view).axes[0]
    order = view.sorted_methods("baseline_answer_bits_per_byte")
    spread, base = view.spread("int8", "baseline_answer_bits_per_byte"), view.spread("baseline", "baseline_answer_bits_per_byte")
    assert spread is not None and base is not None
    y = order.index("int8")
    lines = [list(line.get_xdata()) for line in axes.lines if list(line.get_ydata()) == [y, y]]
    assert lines == [pytest.approx([spread.p10, spread.p90])]
    assert any(list(line.get_ydata()) == [0, 1] and list(line.get_xdata()) == [base.median] * 2 for line in axes.lines)


@pytest.mark.parametrize(("method", "words"), [("mpo", "not measured"), ("bnb_int8", "failed"), ("chai", "waiting")])
def test_what_was_not_measured_is_said_and_is_no_bar(method: str, words: str) -> None:
    view = view_of(MANY)
    axes = draw("time_metrics", view).axes[0]
    y = view.sorted_methods("tpot_median_s").index(method)
    assert y not in bars(axes)
    assert [t.get_text() for t in axes.texts if t.get_position()[1] == y] == [words]


@pytest.mark.parametrize("name", [n for n in FIGURES if n != "input_output_pairs"])
def test_every_figure_names_what_failed_and_why(name: str) -> None:
    shown = " ".join(texts(draw(name, view_of(MANY))))
    assert "bnb_int8 failed: The bitsandbytes package is not installed." in shown
    assert "int4: 1 of 4 answers failed: Memory ran out while answering." in shown


def test_dashboard_has_nine_panels_and_quality_has_six() -> None:
    assert len(draw("comprehensive_dashboard", view_of(MANY)).axes) == 9 == sum(map(len, ALL_NINE))
    assert len(draw("quality_comparison", view_of(MANY)).axes) == sum(map(len, QUALITY))


def test_efficiency_says_that_bandwidth_was_not_measured_and_shows_it_where_it_was() -> None:
    assert "Fraction of the memory bandwidth: not measured in this run." in texts(draw("efficiency_metrics", view_of(LONE)))
    record = make_record(methods=("baseline",), queries=1)
    record["rows"][0]["metrics"]["bandwidth_share"] = {"median": 0.5, "p10": 0.4, "p90": 0.6, "n": 3}
    record["definitions"] = {**record["definitions"], "bandwidth_share": {"definition": "Bytes read / bandwidth.", "unit": "share", "better": "high", "title": "Share of the bandwidth"}}
    figure = draw("efficiency_metrics", view_of(record))
    assert len(figure.axes) == 4
    assert bars(figure.axes[3]) == {0: 50.0}


def test_an_outlier_does_not_flatten_the_bars() -> None:
    assert axis_limit([Spread(1.0, 0.9, 100.0, 5), Spread(2.0, 1.9, 2.1, 5)]) == 8.0
    assert axis_limit([Spread(1.0, 0.9, 1.2, 5)]) == 1.2
    assert axis_limit([Spread(0.0, 0.0, 0.1, 5)]) == 0.1
    assert axis_limit([]) == axis_limit([Spread(0.0, 0.0, 0.0, 5)]) == 1.0


def test_output_lengths_shows_every_answer_and_who_was_cut_off() -> None:
    view = view_of(MANY)
    figure = draw("output_lengths", view)
    drawn = [len(c.get_offsets()) for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    assert sum(drawn) == sum(c["status"] == "done" for c in MANY["cells"])
    cut = sum(c["metrics"]["finish_reason"] == "length" for c in view.cells_of("larosa"))
    assert not cut or f"larosa {cut} of 4" in " ".join(texts(figure))


def test_pareto_rings_the_front_and_names_every_method_it_shows_or_leaves_out() -> None:
    view = view_of(MANY)
    figure = draw("pareto", view)
    found, missing = points(view)
    rings = [c for c in figure.axes[0].collections if isinstance(c, PathCollection) and len(c.get_facecolor()) == 0]
    assert len(rings) == len(front(found))
    names = {t.get_text() for t in figure.axes[0].texts}
    assert names == {p.method for p in found}
    shown = " ".join(texts(figure))
    assert "mpo: not shown, memory not measured." in shown
    assert set(missing) == {"mpo", "bnb_int8", "chai"}


def test_names_on_the_pareto_figure_do_not_cover_each_other() -> None:
    figure = draw("pareto", view_of(MANY))
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts]
    assert len(boxes) == 10
    assert not [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.overlaps(b) and min(a.x1, b.x1) - max(a.x0, b.x0) > 3 and min(a.y1, b.y1) - max(a.y0, b.y0) > 6]


def test_pairs_show_each_question_and_answer_and_what_differs() -> None:
    record = make_record(methods=("baseline", "int8", "larosa"), queries=1, texts={("baseline", "q0"): "cats like milk", ("int8", "q0"): "cats hate milk", ("larosa", "q0"): "cats like milk"})
    shown = texts(draw("input_output_pairs", view_of(record)))
    assert "What is question number 0 about?" in shown
    assert "baseline, larosa" in shown
    assert "cats like milk" in shown
    assert "‖ hate" in shown


def test_divergence_is_marked_once_where_the_answers_part() -> None:
    words = marked_words("a b c d e", "a b x d y")
    assert [w.text for w in words] == ["a", "b", "‖", "x", "d", "y"]
    assert [w.text for w in words if w.new] == ["‖", "x", "y"]
    assert not [w for w in marked_words("a b", "a b") if w.new]


def test_pairs_count_the_queries_that_do_not_fit() -> None:
    long = {(m, f"q{q}"): f"{m} {q} " + "word " * 90 for m in ("baseline", "int8", "larosa") for q in range(50)}
    figure = draw("input_output_pairs", view_of(make_record(queries=50, texts=long)))
    questions = [t for t in texts(figure) if t.startswith("What is question")]
    assert 1 < len(questions) < 50
    assert f"{50 - len(questions)} more queries are in the JSON file and in the report." in texts(figure)
    assert figure.get_figheight() * figure.dpi < 2**16


def test_all_methods_shades_by_direction_and_says_it_without_colour() -> None:
    assert shade(200, 100, "tok/s", "high") == pytest.approx(0.5)
    assert shade(200, 100, "s", "low") == pytest.approx(-0.5)
    assert shade(4000, 1, "tok/s", "high") == 1.0
    assert shade(0.75, 0.5, "share", "high") == pytest.approx(0.5)
    assert shade(1, None, "s", "low") == shade(1, 2, "tok", None) == shade(0, 5, "bytes", "low") == 0.0
    assert {"▴", "▾", "n. m."} <= set(texts(draw("all_methods", view_of(MANY))))


def test_files_of_one_model_have_the_plain_names(tmp_path: Path) -> None:
    written = write_figures(make_record(queries=1), tmp_path / "out")
    assert [p.name for p in written] == [f"{n}.png" for n in FIGURES]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in written)


def test_files_of_several_models_carry_the_model_and_one_is_over_all(tmp_path: Path) -> None:
    written = write_figures(make_record(methods=("baseline", "int8"), models=("embedded", "a/b", "../b"), queries=1), tmp_path)
    assert {p.name for p in written} == {f"{n}-{m}.png" for n in FIGURES for m in ("embedded", "a-b", "b")} | {f"{CROSS_MODEL}.png"}
    assert all(p.parent == tmp_path for p in written)


def test_slugs_are_safe_and_differ() -> None:
    assert model_slugs(["a/b", "a-b", "A/b", "..", "日本"]) == ["a-b", "a-b-2", "A-b-3", "model", "model-2"]


def test_cross_model_shows_every_model_in_every_row() -> None:
    record = make_record(methods=THIRTEEN, models=("one", "two", "three"), queries=1, failing={"chai": "no"})
    figure = draw_cross_model(model_views(record))
    assert [sum(len(c.get_offsets()) for c in axes.collections) for axes in figure.axes] == [36, 36, 36]
    assert any("● one" in t and "▲ three" in t for t in texts(figure))
    assert all(math.isfinite(n) for n in numbers(figure))


def test_long_names_are_broken_and_stay_apart() -> None:
    long = [m["method"] for m in NASTY["methods"]]
    lines = name_lines(long)
    assert all(len(v) <= 2 for v in lines.values())
    assert len({tuple(v) for v in lines.values()}) == len(long)
    assert [s.split()[0] for s in shortened(long)] == ["[4]", "[5]"]
    assert len(set(axis_names(long).values())) == len(long)


@pytest.mark.parametrize(("values", "unit", "shown", "text"), [
    ([0.5], "s", "ms", "500"), ([75.0], "s", "s", "75.0"), ([2**31], "bytes", "GiB", "2.00"), ([1500], "bytes", "KiB", "1.46"), ([0.253], "share", "%", "25.3"),
    ([2e5], "chars/s/GiB", "thousand chars/s/GiB", "200"), ([0.0123], "bits/byte", "bits/byte", "0.012"), ([0], "bytes", "B", "0"), ([99.96], "tok/s", "tok/s", "100"), ([], "s", "ms", None),
])
def test_scale_chooses_the_unit_and_three_digits(values: list[float], unit: str, shown: str, text: str | None) -> None:
    scale = scale_of(values, unit)
    assert scale.unit == shown
    assert text is None or scale.text(values[0]) == text


def plain_values(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for v in value.values():
            yield from plain_values(v)
    elif isinstance(value, (list, tuple, np.ndarray)):
        for v in value:
            yield from plain_values(v)
    else:
        yield value


@pytest.mark.parametrize("record", [MANY, LONE, EMPTY, NASTY], ids=["thirteen methods", "baseline alone", "nothing yet", "nasty texts"])
def test_page_figures_are_complete_finite_and_escaped(record: dict[str, Any]) -> None:
    figures = page_figures(record)
    assert tuple(figures) == PAGE_FIGURES
    for figure in figures.values():
        values = list(plain_values(figure.to_dict()))
        assert not [v for v in values if isinstance(v, float) and not math.isfinite(v)]
        assert not [v for v in values if isinstance(v, str) and "<script" in v]


def test_page_bars_are_the_medians_and_the_missing_are_words() -> None:
    view, figure = view_of(MANY), page_figures(MANY)["speed"]
    shown = {row[0]: x for row, x in zip(figure.data[0].customdata, figure.data[0].x, strict=True)}
    assert shown == pytest.approx({r.method: r.metrics["decode_tok_s"].median for r in view.rows if "decode_tok_s" in r.metrics})
    said = {a.y: (a.text, a.hovertext) for a in figure.layout.annotations if a.y in ("bnb_int8", "chai")}
    assert said == {"bnb_int8": ("<i>failed</i>", "The bitsandbytes package is not installed."), "chai": ("<i>waiting</i>", None)}


def test_page_figures_of_another_model_and_of_none() -> None:
    record = make_record(models=("one", "two"))
    one, two = page_figures(record)["speed"].data[0].x, page_figures(record, "two")["speed"].data[0].x
    assert max(two) < max(one)
    assert page_figures(record, "three") == {} == page_figures({})
