"""Text from people and models, made safe to show: seen as typed, never run."""

from __future__ import annotations

import re
from html import escape, unescape

# What CommonMark takes for code: fences that open a line, and balanced runs of backticks.
_FENCE = r"^ {0,3}(?P<fence>`{3,}|~{3,})[^\n`]*\n.*?(?:^ {0,3}(?P=fence)[`~]*[ \t]*$|\Z)"
_SPAN = r"(?<![\\`])(?P<ticks>`+)(?!`)[^`]+?(?<!`)(?P=ticks)(?!`)"
_CODE = re.compile(f"{_FENCE}|{_SPAN}", re.DOTALL | re.MULTILINE)
_DEEP_QUOTES = re.compile(r"^(?:[ \t]*>){6,}", re.MULTILINE)


def _inert(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = _DEEP_QUOTES.sub(lambda m: m.group(0).replace(">", "&gt;"), text)
    return text.replace("![", "!&#91;").replace("$$", "$&#36;")


def show_markdown(text: str) -> str:
    """Markdown whose HTML is shown instead of interpreted; images are shown as their text and fetch nothing.

    Where a browser takes less for code than this does, the page's content policy still lets nothing be fetched.
    """
    out, end = [], 0
    for code in _CODE.finditer(text):
        out += [_inert(text[end : code.start()]), code.group(0)]
        end = code.end()
    return "".join([*out, _inert(text[end:])])


def unshow_markdown(text: str) -> str:
    """The text a person means who edited what `show_markdown` gave."""
    return unescape(text)


def show_html(text: object) -> str:
    """Text inside our own HTML."""
    return escape(str(text), quote=True)
