"""Two answers with their differences marked."""

from __future__ import annotations

from engines.answer_diff import marked_html


def answer_diff(baseline: str, fused: str) -> str:
    """HTML of the fused answer against the baseline's: what was left out struck through, what is new underlined."""
    if not baseline or not fused:
        return ""
    if baseline == fused:
        return '<p class="diff-note">The two answers are the same, character by character.</p>'
    legend = '<p class="diff-note"><del>only in the baseline\'s answer</del> <ins>only in the fused answer</ins></p>'
    return f'{legend}<div class="diff">{marked_html(baseline, fused)}</div>'
