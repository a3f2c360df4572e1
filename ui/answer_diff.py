"""Two answers with their differences marked."""

from __future__ import annotations

import difflib
import re

from ui.safe_text import show_html

_WORDS = re.compile(r"\s+|[^\s]+")
_LONGEST = 4000  # words; difflib is quadratic


def answer_diff(baseline: str, fused: str) -> str:
    """HTML of the fused answer against the baseline's: what was left out struck through, what is new underlined."""
    if not baseline or not fused:
        return ""
    if baseline == fused:
        return '<p class="diff-note">The two answers are the same, character by character.</p>'
    old, new = _WORDS.findall(baseline)[:_LONGEST], _WORDS.findall(fused)[:_LONGEST]
    out = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            out.append(show_html("".join(new[c:d])))
            continue
        if b > a:
            out.append(f"<del>{show_html(''.join(old[a:b]))}</del>")
        if d > c:
            out.append(f"<ins>{show_html(''.join(new[c:d]))}</ins>")
    legend = '<p class="diff-note"><del>only in the baseline\'s answer</del> <ins>only in the fused answer</ins></p>'
    return f'{legend}<div class="diff">{"".join(out)}</div>'
