"""Questions and answers as readable text, what differs from the baseline's answer marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from engines.answer_diff import differences
from engines.compare_figures.grid import footing, heading, note_lines, subtitle
from engines.compare_view import ModelView, number
from engines.figure_style.lettering import UNKNOWN, drawable, shorten, text_width, wrap_text
from engines.figure_style.palette import MethodStyle, method_styles
from engines.figure_style.paper import BODY, GRID, INK, MARGIN, MUTED, SMALL, TITLE, WIDTH, Sheet
from engines.methods import BASELINE

LONGEST_QUESTION, LONGEST_ANSWER = 320, 420  # characters
TALLEST = 3400.0  # points
NEW = "#b1440e"  # as the page marks what is worse; with an underline, so that it is seen without colour
_LINE, _INDENT, _HEAD = 11.0, 12.0, 13.0
NOTE = f"First run of each query; methods that answered alike stand together. Underlined: not in the baseline's answer; ‖ is where the two part. {UNKNOWN}: a character that this figure's font lacks."


@dataclass(frozen=True)
class Words:
    """A piece of a line: its text, and whether it is new against the baseline's answer."""

    text: str
    new: bool


@dataclass(frozen=True)
class Answer:
    """One answer laid out: the methods that gave it, what was measured of it, its lines, and a note below."""

    methods: tuple[str, ...]
    names: list[str]
    head: str
    lines: list[list[Words]]
    note: str

    @property
    def height(self) -> float:
        """In points."""
        return _HEAD + _LINE * (len(self.names) - 1 + len(self.lines) + bool(self.note)) + 5


def marked_words(baseline: str | None, text: str) -> list[Words]:
    """The words of an answer, those that the baseline's answer does not have at that place marked; a bar where they first part."""
    if baseline is None or baseline == text:
        return [Words(w, False) for w in drawable(text).split()]
    out, parted = [], False
    for piece in differences(baseline, text):
        if piece.kind in ("removed", "added") and not parted and piece.text.strip():
            out.append(Words("‖", True))
            parted = True
        if piece.kind != "removed":
            out += [Words(w, piece.kind == "added") for w in drawable(piece.text).split()]
    return out


def fill_lines(words: list[Words], width: float, size: float) -> list[list[Words]]:
    """Words in lines of at most `width` points."""
    lines: list[list[Words]] = [[]]
    used, blank = 0.0, text_width(" ", size)
    for word in words:
        text = shorten(word.text, width, size)
        wide = text_width(text, size)
        if lines[-1] and used + wide > width:
            lines.append([])
            used = 0.0
        lines[-1].append(Words(text, word.new))
        used += wide + blank
    return [line for line in lines if line]


def _given(view: ModelView, method: str, query: str) -> tuple[str, str, str]:
    """What a method made of a query the first time: text, else the reason why there is none, and what was measured."""
    cells = [c for c in view.cells if c.get("method") == method and c.get("query") == query]
    cell = next((c for c in cells if c.get("status") == "done"), cells[0] if cells else {})
    if cell.get("status") != "done":
        failed = f"failed: {cell.get('error') or 'no reason recorded'}"
        return "", {"failed": failed, "cancelled": "cancelled"}.get(str(cell.get("status")), "waiting"), ""
    text = str(cell.get("text") or "")
    return text, "" if text.strip() else "an empty answer", _head(cell)


def _head(cell: Mapping[str, Any]) -> str:
    metrics = cell.get("metrics") or {}
    tokens, share = number(metrics.get("output_tokens")), number(metrics.get("agreement_share"))
    parts = [f"{tokens:g} tokens" if tokens is not None else "", f"agreement {share:.0%}" if share is not None else ""]
    return ", ".join(p for p in parts if p)


def _answers(view: ModelView, query: str) -> list[Answer]:
    """The answers to a query, the baseline's first; methods that answered alike share one."""
    groups: dict[tuple[str, str], list[str]] = {}
    heads: dict[tuple[str, str], str] = {}
    for method in sorted(view.methods, key=lambda m: m != BASELINE):
        text, reason, head = _given(view, method, query)
        groups.setdefault((text, reason), []).append(method)
        heads.setdefault((text, reason), head)
    reference = next((str(c.get("text") or "") for c in view.cells_of(BASELINE, query)), None)
    return [_lay_out(tuple(methods), *given, heads[given], None if BASELINE in methods else reference) for given, methods in groups.items()]


def _lay_out(methods: tuple[str, ...], text: str, reason: str, head: str, reference: str | None) -> Answer:
    width = WIDTH - 2 * MARGIN - _INDENT
    names = wrap_text(", ".join(methods), width - text_width(head, SMALL) - 8, SMALL, bold=True)
    if reason:
        return Answer(methods, names, head, [[Words(line, False)] for line in wrap_text(reason, width, BODY)[:4]], "")
    # As much of the reference as of the answer and more: a cut must not look like a difference.
    lines = fill_lines(marked_words(None if reference is None else reference[: 2 * LONGEST_ANSWER], text[:LONGEST_ANSWER]), width, BODY)
    return Answer(methods, names, head, lines, f"… {len(text) - LONGEST_ANSWER:,} more characters" if len(text) > LONGEST_ANSWER else "")


def _question(text: str) -> list[str]:
    cut = text if len(text) <= LONGEST_QUESTION else text[:LONGEST_QUESTION].rstrip() + "…"
    return wrap_text(cut, WIDTH - 2 * MARGIN, BODY, bold=True)


def _blocks(view: ModelView) -> Iterator[tuple[list[str], list[Answer], float]]:
    """Queries until the sheet is full, with their heights; the first always."""
    used = 0.0
    for query in view.queries:
        question, answers = _question(str(query.get("question") or "")), _answers(view, str(query.get("id")))
        height = 11 * len(question) + 8 + sum(a.height for a in answers) + 10
        if used and used + height > TALLEST:
            return
        used += height
        yield question, answers, height


def input_output_pairs(view: ModelView) -> Figure:
    """Each question with every method's answer; what does not fit on the sheet is counted, never silently left out."""
    blocks = list(_blocks(view))
    left_out = len(view.queries) - len(blocks)
    more = [f"{left_out} more {'query is' if left_out == 1 else 'queries are'} in the JSON file and in the report."] if left_out else []
    below = wrap_text(subtitle(view), WIDTH - 2 * MARGIN, SMALL)
    notes = note_lines([NOTE, *more])
    sheet = Sheet(MARGIN + 13 + 10 * len(below) + 8 + 10 * len(notes) + 8 + sum(h for *_, h in blocks) + MARGIN, dpi=200)
    top = heading(sheet, wrap_text("Questions and answers", WIDTH - 2 * MARGIN, TITLE, bold=True), below)
    footing(sheet, top, notes)
    top += 10 * len(notes) + 8
    styles = method_styles(view.methods)
    for question, answers, height in blocks:
        _draw_block(sheet, top, question, answers, styles)
        top += height
    return sheet.figure


def _draw_block(sheet: Sheet, top: float, question: list[str], answers: list[Answer], styles: Mapping[str, MethodStyle]) -> None:
    sheet.line(MARGIN, top, WIDTH - MARGIN, GRID, 0.8)
    top += 6
    for line in question:
        sheet.text(MARGIN, top, line, BODY, weight="bold")
        top += 11
    top += 2
    for answer in answers:
        _draw_answer(sheet, top, answer, [styles[m].colour for m in answer.methods])
        top += answer.height


def _draw_answer(sheet: Sheet, top: float, answer: Answer, colours: list[str]) -> None:
    part = (answer.height - 7) / len(colours)
    for place, colour in enumerate(colours):
        sheet.bar(MARGIN, top + 1 + place * part, 3, part, colour)
    sheet.text(WIDTH - MARGIN, top, answer.head, SMALL, MUTED, ha="right")
    for name in answer.names:
        sheet.text(MARGIN + _INDENT, top, name, SMALL, weight="bold")
        top += _LINE
    top += _HEAD - _LINE - 1
    for line in answer.lines:
        _draw_line(sheet, top, line)
        top += _LINE
    if answer.note:
        sheet.text(MARGIN + _INDENT, top, answer.note, SMALL, MUTED, style="italic")


def _draw_line(sheet: Sheet, top: float, line: list[Words]) -> None:
    left, blank = MARGIN + _INDENT, text_width(" ", BODY)
    start = 0
    while start < len(line):  # neighbours of one kind are one text
        end = next((n for n in range(start, len(line)) if line[n].new != line[start].new), len(line))
        text = " ".join(w.text for w in line[start:end])
        wide, new = text_width(text, BODY), line[start].new
        sheet.text(left, top, text, BODY, NEW if new else INK)
        if new:
            sheet.line(left, top + 10.2, left + wide, NEW, 0.6)
        left += wide + blank
        start = end
