"""Query files: what is read, and what is refused, with the line and nothing half-loaded."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from engines.compare.queries import Query, built_in_queries
from engines.compare.query_files import read_queries

CSV = 'id,question,kind,keywords\nsky,"Why is the sky blue, and not green?",why,light; scatter ;\n,What is rain?,,\n'


def test_csv_with_all_columns_is_read() -> None:
    assert read_queries(CSV.encode(), "a.csv") == (
        Query("sky", "why", "Why is the sky blue, and not green?", ("light", "scatter")), Query("q2", "own", "What is rain?"),
    )


@pytest.mark.parametrize("text", [CSV, "\ufeff" + CSV, CSV.replace("\n", "\r\n"), "\n\n" + CSV, CSV.replace("id,question", " ID , Question ")], ids=["plain", "byte order mark", "CRLF", "blank lines", "spelling"])
def test_same_csv_in_other_clothes_is_the_same(text: str) -> None:
    assert read_queries(text.encode(), "a.CSV") == read_queries(CSV.encode(), "a.csv")


def test_question_column_alone_is_enough_and_short_rows_are_filled_up() -> None:
    assert read_queries(b"question\nWhat is rain?\n", "a.csv") == (Query("q1", "own", "What is rain?"),)
    assert read_queries(b"question,kind\nWhat is rain?\n", "a.csv") == (Query("q1", "own", "What is rain?"),)


def test_quotes_may_hold_quotes_commas_and_lines() -> None:
    assert read_queries(b'question\n"Say ""a, b"",\nplease"\n', "a.csv")[0].question == 'Say "a, b",\nplease'


def test_text_is_a_question_a_line() -> None:
    assert [q.question for q in read_queries("\ufeffWhat is rain?\r\n\r\n  Was ist Wärme? \n".encode(), "a.txt")] == ["What is rain?", "Was ist Wärme?"]


def test_json_is_a_list_of_texts_or_objects() -> None:
    data = ["What is rain?", {"question": "What is snow?", "keywords": ["water", "cold"], "id": "snow"}, {"question": "x", "keywords": "a;b", "kind": "k"}]
    assert read_queries(json.dumps(data).encode(), "a.json") == (
        Query("q1", "own", "What is rain?"), Query("snow", "own", "What is snow?", ("water", "cold")), Query("q3", "k", "x", ("a", "b")),
    )


def test_built_in_file_and_a_record_are_query_files() -> None:
    file = Path(__file__).resolve().parents[3] / "assets" / "queries.json"
    assert read_queries(file) == built_in_queries()
    assert read_queries(json.dumps({"format": 1, "queries": json.loads(file.read_text())}).encode(), "a.json") == built_in_queries()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.csv", b"", r"a\.csv is empty.*question"),
        ("a.csv", b" \r\n\t\n", "is empty"),
        ("a.csv", b"\xef\xbb\xbf", "is empty"),
        ("a.txt", b"\n\n", "is empty"),
        ("a.csv", b"question,kind\n", "no query in it"),
        ("a.json", b"[]", "no query in it"),
        ("a.csv", b"wording,kind\nx,y\n", "line 1: there is no column 'wording'.*question"),
        ("a.csv", b"query,question\nx,y\n", "line 1: the column question is there twice"),
        ("a.json", b'[{"query": "x", "prompt": "y"}]', "query 1, line 1: a field is there twice"),
        ("a.csv", b"What is rain?\nWhat is snow?\n", "line 1: there is no column 'what is rain"),
        ("a.csv", b"kind,keywords\nx,y\n", "line 1: the column question is missing"),
        ("a.csv", b"question,question\nx,y\n", "line 1: the column question is there twice"),
        ("a.csv", b"question;kind\nx;y\n", "line 1: the columns are parted by something else"),
        ("a.csv", b"question\tkind\nx\ty\n", "line 1: the columns are parted by something else"),
        ("a.csv", "question\nx\n".encode("utf-16"), "line 1: this is UTF-16 text. Save it as UTF-8"),
        ("a.txt", "What is rain?\n".encode("utf-16-le"), "line 1: there is a NUL byte"),
        ("a.csv", b"question\nWhat is rain?\nWh\x00at\n", "line 3: there is a NUL byte"),
        ("a.csv", b"question\nWhat is rain?\nW\xe4rme\n", "line 3: this is not UTF-8"),
        ("a.csv", b"<!DOCTYPE html>\n<html><body>question</body></html>", "line 1: this is HTML"),
        ("a.csv", b"\n\n  <html>question</html>", "line 3: this is HTML"),
        ("a.csv", b"PK\x03\x04rest", "line 1: this is a spreadsheet or zip"),
        ("a.csv", b"%PDF-1.7", "line 1: this is a PDF"),
        ("a.csv", b'question\nfine\n"never closed\nand on\nand on\n', "line 3: a double quote that opens here is never closed"),
        ("a.csv", b'question\nfine\n"half" closed\n', "line 3: this is not CSV"),
        ("a.csv", b"question,kind\nfine,x\nWhat, me, worry?\n", "line 3: there are 3 cells under 2 columns"),
        ("a.csv", b"question,kind\nfine,x\n ,y\n", "line 3: the question is empty"),
        ("a.csv", "question\nfine\n\u200b\u200b\n".encode(), "line 3: the question is empty"),
        ("a.csv", b"question,id\na,x\n\"two\nlines\",y\nb,x\n", "line 5: the id 'x' is taken already .line 2."),
        ("a.csv", b"question,id\na,q2\nb,\n", "line 3: the id 'q2' is taken already .line 2."),
        ("a.csv", b"question,id\na," + b"x" * 101, "line 2: id has 101 characters"),
        ("a.csv", b"question,keywords\na," + b"x" * 101, "line 2: at most 50 keywords of 100"),
        ("a.csv", b"question,keywords\na," + b";".join(b"%d" % n for n in range(51)), "line 2: at most 50 keywords"),
        ("a.csv", b"question\nfine\n" + b"x" * 20_001, "line 3: question has 20,001 characters"),
        ("a.txt", b"fine\n" + b"x" * 20_001, "line 2: question has 20,001 characters"),
        ("a.json", b'[\n"x",\n{"question": 3}\n]', "query 2, line 3: question is '3'"),
        ("a.json", b'["x",\n3]', "query 2, line 2: this is neither"),
        ("a.json", b'["x",\n\n  {"wording": "y"}]', "query 2, line 3: there is no field 'wording'"),
        ("a.json", b'[{"question": "x", "keywords": [1]}]', "query 1, line 1: the keywords are no texts"),
        ("a.json", b'[{"question": "x", "keywords": {"a": 1}}]', "line 1: the keywords are no texts"),
        ("a.json", b'[{"question": "a\\u0000b"}]', "holds a NUL character"),
        ("a.json", b'["x",\n"y"\n"z"]', "line 3: this is not JSON"),
        ("a.json", b'{"question": "x"}', "line 1: this is no list of queries"),
        ("a.json", b"3", "this is no list of queries"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "a number is too long"),
        ("a.xlsx", b"PK", "are read from .csv, .json and .txt"),
        ("queries", b"x", "are read from .csv, .json and .txt"),
    ],
)
def test_bad_file_is_refused_with_the_line(name: str, data: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refusal:
        read_queries(data, name)
    assert len(str(refusal.value)) < 500


def test_a_million_rows_are_refused_soon() -> None:
    data = b"question\n" + b"What is rain?\n" * 1_000_000
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"line 1002: there are more than 1,000 queries"):
        read_queries(data, "a.csv")
    assert time.monotonic() - began < 5
    assert len(read_queries(b"question\n" + b"What is rain?\n" * 1000, "a.csv")) == 1000


@pytest.mark.parametrize("cell", [b"x" * 50_000_000, b'"' + b"x" * 50_000_000 + b'"', b'"' + b"What is rain?\n" * 3_000_000], ids=["bare", "quoted", "unclosed quote"])
def test_a_cell_of_50_megabytes_is_refused_soon(cell: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"line 3: a cell that begins here is longer than 20,000"):
        read_queries(b"question\nfine\n" + cell + b"\n", "a.csv")
    assert time.monotonic() - began < 5


def test_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)  # sparse
    with pytest.raises(InvalidRequest, match=r"has 10\.0 GiB; at most 64\.0 MiB"):
        read_queries(path)


def test_path_that_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InvalidRequest, match="is no file"):
        read_queries(tmp_path / "folder.csv")
    with pytest.raises(InvalidRequest, match=r"gone\.csv cannot be read: No such file"):
        read_queries(tmp_path / "gone.csv")


def test_name_of_an_upload_is_shown_without_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "secret" / "a.csv"
    path.parent.mkdir()
    path.write_text("kind\n")
    with pytest.raises(InvalidRequest) as refusal:
        read_queries(path)
    assert "secret" not in str(refusal.value)


@given(st.binary(max_size=200), st.sampled_from(["a.csv", "a.json", "a.txt"]))
def test_any_bytes_are_read_or_refused_in_words(data: bytes, name: str) -> None:
    try:
        queries = read_queries(data, name)
    except InvalidRequest:
        return
    assert queries and all(q.question.strip() for q in queries) and len({q.id for q in queries}) == len(queries)


@given(st.text(alphabet='question,"\n\r;[]{}: ab\ufeff\u0000\ud800', max_size=60), st.sampled_from(["a.csv", "a.json", "a.txt"]))
def test_any_text_is_read_or_refused_in_words(text: str, name: str) -> None:
    try:
        queries = read_queries(text.encode("utf-8", "surrogatepass"), name)
    except InvalidRequest:
        return
    assert queries


@pytest.mark.parametrize("name", ["question", "query", "prompt", " Query "])
def test_question_column_may_have_its_usual_names(name: str) -> None:
    (from_csv,) = read_queries(f"{name},expected_keywords\nWhat is rain?,water;cloud\n".encode(), "a.csv")
    (from_json,) = read_queries(json.dumps([{name.strip().lower(): "What is rain?", "expected_keywords": ["water", "cloud"]}]).encode(), "a.json")
    assert from_csv.question == from_json.question == "What is rain?" and from_csv.keywords == from_json.keywords == ("water", "cloud")
