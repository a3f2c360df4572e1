"""Queries from a user's CSV, JSON or text file: all of them, or a message with the line and what to do."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InvalidRequest
from core.units import format_bytes
from engines.compare.queries import MAX_CHARACTERS, MAX_QUERIES, Query
from engines.prompting import has_visible_text

MAX_FILE_BYTES = 64 * 2**20
MAX_KEYWORDS, MAX_SHORT = 50, 100
COLUMNS = ("question", "kind", "keywords", "id")
_ALSO = {"query": "question", "prompt": "question", "expected_keywords": "keywords", "type": "kind"}
_HELP = f"The columns are question and, where wanted, kind, keywords (parted by ;) and id; at most {MAX_QUERIES:,} queries of {MAX_CHARACTERS:,} characters."
_FOREIGN = ((b"PK\x03\x04", "a spreadsheet or zip file"), (b"%PDF", "a PDF file"), (b"\x1f\x8b", "a gzip file"), (b"\x89PNG", "a picture"))


@dataclass(frozen=True)
class _Row:
    """One query as it was found. `where` says the line; the values are not checked yet."""

    where: str
    values: Mapping[str, Any]


def read_queries(source: Path | bytes, name: str | None = None) -> tuple[Query, ...]:
    """All queries of a file; `name` says the format by its ending: .csv, .json or .txt.

    Raises:
        InvalidRequest: anything is wrong with it; nothing is taken then.
    """
    shown = Path(name if name is not None else source.name if isinstance(source, Path) else "queries").name
    reader = _READERS.get(Path(shown).suffix.lower())
    if reader is None:
        raise InvalidRequest(f"{shown}: queries are read from .csv, .json and .txt files. Save it as one of these.")
    text = _text_of(_bytes_of(source, shown), shown)
    return _checked(reader(text, shown), shown)


def _bytes_of(source: Path | bytes, shown: str) -> bytes:
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if isinstance(source, Path) and not source.is_file():
            raise InvalidRequest(f"{shown} is no file.")
        if size > MAX_FILE_BYTES:
            raise InvalidRequest(f"{shown} has {format_bytes(size)}; at most {format_bytes(MAX_FILE_BYTES)} are read. {_HELP}")
        return source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{shown} cannot be read: {error.strerror}.") from error


def _text_of(data: bytes, shown: str) -> str:
    """The file as text, a byte order mark left out.

    Raises:
        InvalidRequest: empty, or no UTF-8 text; says the line.
    """
    for start, what in _FOREIGN:
        if data.startswith(start):
            raise InvalidRequest(f"{shown}, line 1: this is {what}, whatever its name says. Save the queries as CSV, JSON or plain text.")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InvalidRequest(f"{shown}, line 1: this is UTF-16 text. Save it as UTF-8 (in Excel: CSV UTF-8).")
    place = data.find(b"\0")
    if place >= 0:
        raise InvalidRequest(f"{shown}, line {_line(data, place)}: there is a NUL byte, which no text has. Save the file as UTF-8 text.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{shown}, line {_line(data, error.start)}: this is not UTF-8 text. Save the file as UTF-8 (in Excel: CSV UTF-8).") from error
    if not has_visible_text(text):
        raise InvalidRequest(f"{shown} is empty. {_HELP}")
    if text.lstrip()[:1] == "<":
        line = text[: len(text) - len(text.lstrip())].count("\n") + 1
        raise InvalidRequest(f"{shown}, line {line}: this is HTML or XML, whatever its name says. Save the queries as CSV, JSON or plain text.")
    return text


def _line(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1


def _csv_rows(text: str, shown: str) -> Iterator[_Row]:
    """Rows of a CSV file with a header."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InvalidRequest(f"{shown}, line {line}: {_csv_fault(error)}") from error
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = _header(cells, f"{shown}, line {line}")
        elif len(cells) > len(header):
            raise InvalidRequest(f"{shown}, line {line}: there are {len(cells)} cells under {len(header)} columns. Put a text that holds a comma between double quotes.")
        else:
            yield _Row(f"{shown}, line {line}", dict(zip(header, cells, strict=False)))


def _csv_fault(error: csv.Error) -> str:
    said = str(error)
    if "unexpected end" in said:
        return "a double quote that opens here is never closed. Close it, or double it where it belongs to the text."
    if "field larger" in said:
        return f"a cell that begins here is longer than {MAX_CHARACTERS:,} characters. Shorten it; if it should be short, a double quote is not closed."
    return f"this is not CSV ({said}). Put texts with commas, quotes or line breaks between double quotes, and double the quotes inside."


def _header(cells: list[str], where: str) -> list[str]:
    names = [_ALSO.get(name, name) for name in (cell.strip().lower() for cell in cells)]
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise InvalidRequest(f"{where}: the columns are parted by something else than commas. Save the file with commas.")
    for name in names:
        if name not in COLUMNS:
            raise InvalidRequest(f"{where}: there is no column {name[:40]!r}; the first line names the columns. {_HELP}")
        if names.count(name) > 1:
            raise InvalidRequest(f"{where}: the column {name} is there twice. Keep one.")
    if "question" not in names:
        raise InvalidRequest(f"{where}: the column question is missing. {_HELP}")
    return names


def _json_rows(text: str, shown: str) -> Iterator[_Row]:
    """Entries of a JSON list, or of the list `queries` of an object, such as an earlier comparison's record."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{shown}, line {error.lineno}: this is not JSON ({error.msg}, column {error.colno}).") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{shown} is JSON that cannot be read: a number is too long, or lists are nested too deep.") from error
    entries = data.get("queries") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise InvalidRequest(f"{shown}, line 1: this is no list of queries. Write [{{\"question\": \"...\", \"keywords\": [\"...\"]}}, ...].")
    lines = _entry_lines(text) if isinstance(data, list) else []
    for place, entry in enumerate(entries):
        where = f"{shown}, query {place + 1}" + (f", line {lines[place]}" if place < len(lines) else "")
        if not isinstance(entry, (str, dict)):
            raise InvalidRequest(f"{where}: this is neither a text nor an object with a question.")
        values = {"question": entry} if isinstance(entry, str) else {_ALSO.get(str(k), str(k)): v for k, v in entry.items()}
        if isinstance(entry, dict) and len(values) < len(entry):
            raise InvalidRequest(f"{where}: a field is there twice, under two names. Keep one.")
        unknown = next((k for k in values if k not in COLUMNS), None)
        if unknown is not None:
            raise InvalidRequest(f"{where}: there is no field {unknown[:40]!r}. {_HELP}")
        yield _Row(where, values)


def _entry_lines(text: str) -> list[int]:
    """The line on which each entry of a JSON list begins."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    lines: list[int] = []
    place = text.index("[") + 1
    while True:
        while text[place] in " \t\r\n,":
            place += 1
        if text[place] == "]":
            return lines
        line, counted = line + text.count("\n", counted, place), place
        lines.append(line)
        _, place = decoder.raw_decode(text, place)


def _text_rows(text: str, shown: str) -> Iterator[_Row]:
    """One question a line; blank lines count for nothing."""
    for number, line in enumerate(re.split(r"\r\n?|\n", text), 1):
        if line.strip():
            yield _Row(f"{shown}, line {number}", {"question": line})


_READERS: dict[str, Callable[[str, str], Iterator[_Row]]] = {".csv": _csv_rows, ".json": _json_rows, ".txt": _text_rows}


def _checked(rows: Iterator[_Row], shown: str) -> tuple[Query, ...]:
    """All rows as queries; the first thing wrong ends it."""
    queries: list[Query] = []
    seen: dict[str, str] = {}
    for row in rows:
        if len(queries) == MAX_QUERIES:
            raise InvalidRequest(f"{row.where}: there are more than {MAX_QUERIES:,} queries. Keep the first {MAX_QUERIES:,}, or part the file.")
        query = _query(row, len(queries) + 1)
        if query.id in seen:
            raise InvalidRequest(f"{row.where}: the id {query.id[:60]!r} is taken already ({seen[query.id]}). Give each query its own.")
        seen[query.id] = row.where.removeprefix(f"{shown}, ")
        queries.append(query)
    if not queries:
        raise InvalidRequest(f"{shown}: there is no query in it. {_HELP}")
    return tuple(queries)


def _query(row: _Row, number: int) -> Query:
    question = _short(row, "question", MAX_CHARACTERS)
    if not has_visible_text(question):
        raise InvalidRequest(f"{row.where}: the question is empty. Fill it in, or delete the line.")
    kind, own_id = _short(row, "kind", MAX_SHORT), _short(row, "id", MAX_SHORT)
    return Query(own_id or f"q{number}", kind or "own", question, _keywords(row))


def _keywords(row: _Row) -> tuple[str, ...]:
    given = row.values.get("keywords") or []
    words = given.split(";") if isinstance(given, str) else given
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise InvalidRequest(f"{row.where}: the keywords are no texts. Write them parted by ;.")
    kept = tuple(dict.fromkeys(w.strip() for w in words if has_visible_text(w)))
    if len(kept) > MAX_KEYWORDS or any(len(w) > MAX_SHORT for w in kept):
        raise InvalidRequest(f"{row.where}: at most {MAX_KEYWORDS} keywords of {MAX_SHORT} characters are taken. Part them by ;.")
    return kept


def _short(row: _Row, name: str, limit: int) -> str:
    """A text of a row, trimmed; empty where there is none."""
    value = row.values.get(name)
    if not isinstance(value, (str, type(None))):
        raise InvalidRequest(f"{row.where}: {name} is {str(value)[:40]!r}, no text.")
    text = (value or "").strip().encode("utf-8", "replace").decode("utf-8")  # JSON can spell half characters
    if len(text) > limit:
        raise InvalidRequest(f"{row.where}: {name} has {len(text):,} characters; at most {limit:,} are taken. Shorten it.")
    if "\0" in text:
        raise InvalidRequest(f"{row.where}: {name} holds a NUL character. Delete it.")
    return text
