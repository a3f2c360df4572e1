"""Colours by name, text measured in points, figures written whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from engines.figure_style.lettering import UNKNOWN, drawable, shorten, text_width, wrap_text
from engines.figure_style.palette import NEUTRAL, PALETTE, method_styles
from engines.figure_style.paper import save_figure
from tests.engines.compare_records import THIRTEEN

COMBINATIONS = ("native+int8", "native+int4", "native+larosa", "native+int8+larosa", "larosa:sparsity=0.3", "word_removal:every=4+int8", "int8+larosa", "made_up")


def test_no_two_methods_look_alike_and_the_baseline_is_neutral() -> None:
    styles = method_styles([*THIRTEEN, "native", *COMBINATIONS])
    assert len({(s.colour, s.shape) for s in styles.values()}) == len(styles)
    assert styles["baseline"].colour == NEUTRAL
    assert {s.colour for m, s in styles.items() if m != "baseline"} <= set(PALETTE)


@pytest.mark.parametrize("method", [*THIRTEEN, "native"])
def test_a_named_method_looks_the_same_in_every_company(method: str) -> None:
    alone = method_styles([method])[method]
    assert method_styles([*THIRTEEN, *COMBINATIONS, method])[method] == alone
    assert method_styles([method, *reversed(COMBINATIONS)])[method] == alone


def test_styles_do_not_depend_on_the_order_of_methods() -> None:
    assert method_styles(COMBINATIONS) == method_styles(tuple(reversed(COMBINATIONS)))


def test_a_combination_has_the_colour_of_its_last_technique_and_another_shape() -> None:
    styles = method_styles(["int8", "native+int8"])
    assert styles["int8"].colour == styles["native+int8"].colour
    assert styles["int8"].hatch != styles["native+int8"].hatch
    assert styles["int8"].marker != styles["native+int8"].marker


def test_more_methods_than_looks_still_have_one_each() -> None:
    names = [f"method_{n}" for n in range(60)]
    assert list(method_styles(names)) == names


def test_characters_the_font_lacks_and_control_characters_are_shown_as_unknown() -> None:
    assert drawable("a人\x00b\nc\td") == f"a{UNKNOWN}{UNKNOWN}b c d"


@given(st.text(max_size=200), st.floats(30, 400))
def test_wrapped_lines_fit_and_lose_nothing(text: str, width: float) -> None:
    lines = wrap_text(text, width, 8.5)
    assert all(text_width(line, 8.5) <= width or len(line) == 1 for line in lines)
    assert "".join("".join(lines).split()) == "".join(drawable(text).split())


@given(st.text(max_size=60), st.floats(20, 200))
def test_shortened_text_fits_and_says_that_it_is_shorter(text: str, width: float) -> None:
    short = shorten(text, width, 8.5)
    assert text_width(short, 8.5) <= width
    assert short == drawable(text) or short.endswith("…")


def test_a_figure_that_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_figure(Figure(figsize=(1, 1)), path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("core.files.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_figure(Figure(figsize=(2, 2)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
