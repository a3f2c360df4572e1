"""Labelled data: every layout read, every bad file refused with what is wrong, nothing scored that was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import FuseboxError, InvalidRequest, MissingDependency, ModelNotFound
from core.labelled_data import Example, load_labelled


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def test_embedded_sentiment_is_large_balanced_and_apart() -> None:
    data = load_labelled("embedded")
    assert data.labels == ("negative", "positive") and not data.is_choice
    assert len(data.train) >= 3000 and len(data.validation) >= 1500
    assert 0.5 <= data.chance < 0.52
    assert not {e.texts for e in data.train} & {e.texts for e in data.validation}


def test_glue_tables_of_one_and_of_two_sentences(tmp_path: Path) -> None:
    single = write(tmp_path, train_tsv="sentence\tlabel\na \"quoted\" film\t1\ndull\t0\n", validation_tsv="sentence\tlabel\nfine\t1\nbad\t0\n")
    assert load_labelled(str(single)).train == (Example(('a "quoted" film',), 1), Example(("dull",), 0))
    (tmp_path / "pair").mkdir()
    pair = write(tmp_path / "pair", validation_tsv="index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n1\tC.\tD.\tentailment\n")
    data = load_labelled(str(pair))
    assert data.labels == ("entailment", "not_entailment") and data.train == ()
    assert data.validation[0] == Example(("A.", "B."), 1)


def test_piqa_is_a_choice_between_two_endings(tmp_path: Path) -> None:
    rows = [{"goal": "Dry socks?", "sol1": "Hang them up.", "sol2": "Eat them.", "label": 0}, {"goal": "Boil eggs?", "sol1": "Freeze.", "sol2": "Heat water.", "label": 1}]
    data = load_labelled(str(write(tmp_path, validation_jsonl="".join(json.dumps(r) + "\n" for r in rows))))
    assert data.is_choice and data.chance == 0.5
    assert data.validation[1] == Example(("Freeze.", "Heat water."), 1, "Boil eggs?")


def test_what_is_scored_is_not_trained_on(tmp_path: Path) -> None:
    data = load_labelled(str(write(tmp_path, train_tsv="sentence\tlabel\nsame\t1\nother\t0\n", validation_tsv="sentence\tlabel\nsame\t1\nnew\t0\n")))
    assert [e.texts for e in data.train] == [("other",)]


BAD = [
    ("train_tsv", "sentence\tlabel\na\t1\n", "no validation examples"),
    ("validation_tsv", "sentence\tlabel\n", "no validation examples"),
    ("validation_tsv", "sentence\tlabel\na\t1\nb\t1\n", "one class only, '1'"),
    ("validation_tsv", "sentence\tlabel\na\t1\nb\t\n", "line 3 has no label"),
    ("validation_tsv", "sentence\na\nb\n", "line 2 has no label"),
    ("validation_tsv", "text\tlabel\na\t1\nb\t0\n", "line 2 lacks text: it needs sentence"),
    ("validation_tsv", "sentence1\tsentence2\tlabel\na\tb\t1\nc\t\t0\n", "line 3 lacks text"),
    ("validation_jsonl", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}\n', "must be 0 or 1"),
    ("validation_jsonl", '{"goal": "a", "sol1": "b", "sol2": "c", "label": -1}\n', "row 1 has no label"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_bad_file_is_refused_with_what_is_wrong(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load_labelled(str(write(tmp_path, **{name: text})))


def test_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "validation.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\x00\t1\n")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        load_labelled(str(tmp_path))


@pytest.mark.parametrize(("name", "kind"), [("", InvalidRequest), ("/no/such/folder", ModelNotFound), ("./none", ModelNotFound), ("a\\b", ModelNotFound), ("x" * 400, InvalidRequest)])
def test_unknown_data_set_is_refused(name: str, kind: type[FuseboxError]) -> None:
    with pytest.raises(kind):
        load_labelled(name)


def test_local_folder_can_be_closed(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="closed"):
        load_labelled(str(tmp_path), allow_local=False)


def test_hub_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependency, match="pip install datasets"):
        load_labelled("glue/sst2")


@pytest.mark.parametrize(("folder", "size", "labels"), [("sst2", 436, 2), ("rte", 139, 2), ("piqa", 919, 2)])
def test_real_data_is_read(folder: str, size: int, labels: int, shared: Callable[..., Path]) -> None:
    data = load_labelled(str(shared("data", folder)))
    assert abs(len(data.validation) - size) <= 2 and len(data.labels) == labels
    assert data.is_choice == (folder == "piqa") and bool(data.train) == (folder != "piqa")
