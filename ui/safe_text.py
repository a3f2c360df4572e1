"""Text from people and models, made safe to show: seen as typed, never run."""

from __future__ import annotations

import re
from html import escape

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_DEEP_QUOTES = re.compile(r"^(?:[ \t]*>){6,}", re.MULTILINE)


def show_markdown(text: str) -> str:
    """Markdown whose HTML is shown instead of interpreted; images are shown as their text and fetch nothing."""
    parts = _CODE.split(text)
    for place in range(0, len(parts), 2):
        safe = parts[place].replace("&", "&amp;").replace("<", "&lt;")
        safe = _DEEP_QUOTES.sub(lambda m: m.group(0).replace(">", "&gt;"), safe)
        parts[place] = safe.replace("![", "!&#91;").replace("$$", "$&#36;")
    return "".join(parts)


def show_html(text: object) -> str:
    """Text inside our own HTML."""
    return escape(str(text), quote=True)
