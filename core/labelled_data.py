"""Labelled examples: single texts, pairs of texts, or two endings to choose from; embedded, from a local folder, or from the hub."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.datasets import read_jsonl
from core.errors import InvalidRequest, MissingDependency, ModelNotFound

EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "datasets"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Example:
    """What a model reads, and the right answer's number. texts: one text, two that belong together, or of a choice the two endings of `question`."""

    texts: tuple[str, ...]
    label: int
    question: str = ""


@dataclass(frozen=True)
class LabelledData:
    """A data set. is_choice: it is asked which of an example's texts is the likelier ending; else which of `labels` fits its texts."""

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    is_choice: bool = False

    @property
    def chance(self) -> float:
        """Accuracy of always saying the commonest label of the validation part."""
        counts = [sum(e.label == label for e in self.validation) for label in range(len(self.labels))]
        return max(counts) / len(self.validation)


def load_labelled(name: str, *, allow_local: bool = True) -> LabelledData:
    """A labelled data set.

    Args:
        name: `embedded` (sentiment); a local folder with train and validation files, GLUE's tsv (`sentence` or `sentence1` and `sentence2`, and
            `label`) or jsonl (the same fields, or PIQA's `goal`, `sol1`, `sol2`, `label`); else a data set of the hub, as `glue/sst2`.
        allow_local: False closes local folders (a public Space).

    Raises:
        ModelNotFound: there is no such folder or hub data set.
        InvalidRequest: a file has no labels, one class only, or an unreadable row; there are no validation examples.
        MissingDependency: a hub data set without the package `datasets`.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > 300 or "\0" in name:
        raise InvalidRequest(f"The data set is {str(name)[:80]!r}; use embedded, a local folder, or a data set of the hub.")
    if name == "embedded":
        return _of_rows("embedded", {split: _tagged(EMBEDDED_FOLDER / "sentiment" / f"{split}.jsonl") for split in SPLITS}, ("negative", "positive"))
    folder = Path(name).expanduser()
    if allow_local and folder.is_dir():
        return _of_rows(folder.name, {split: _read_split(folder, split) for split in SPLITS})
    if name.startswith(("/", ".", "~")) or "\\" in name:
        raise ModelNotFound(f"{name!r}: " + ("there is no such folder." if allow_local else "local folders are closed here."))
    return _of_rows(name, _from_hub(name))


Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its fields."""


def _tagged(path: Path) -> list[Row]:
    return [(f"{path.name}, row {number}", row) for number, row in enumerate(read_jsonl(path), 1)]


def _read_split(folder: Path, split: str) -> list[Row]:
    """The rows of `split`.tsv or `split`.jsonl; none where there is neither."""
    table = folder / f"{split}.tsv"
    if table.is_file():
        try:
            with table.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
                return [(f"{table.name}, line {number}", row) for number, row in enumerate(reader, 2)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InvalidRequest(f"{table.name} is not a table of UTF-8 text separated by tabs: {error}.") from error
    for name in (f"{split}.jsonl", f"{split}.jsonl.zst"):
        if (folder / name).is_file():
            return _tagged(folder / name)
    return []


def _from_hub(name: str) -> dict[str, list[Row]]:
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingDependency(f"{name!r} is neither embedded nor a local folder; for data sets of the hub run `pip install datasets`.") from error
    path, _, subset = name.partition("/") if name.startswith("glue/") else (name, "", "")
    try:
        found = datasets.load_dataset(path, subset or None)
    except Exception as error:  # the package raises many kinds
        raise ModelNotFound(f"The data set {name!r} cannot be had from the hub: {str(error).splitlines()[0][:200]}") from error
    return {split: [(f"{name}, {split}, row {number}", row) for number, row in enumerate(found.get(split, ()), 1)] for split in SPLITS}


def _of_rows(name: str, rows: Mapping[str, Sequence[Row]], names: tuple[str, ...] = ()) -> LabelledData:
    """Rows as examples; raises InvalidRequest where they do not make a data set."""
    if not rows["validation"]:
        raise InvalidRequest(f"{name} has no validation examples; it needs a validation.tsv or validation.jsonl that is not empty.")
    first = rows["validation"][0][1]
    if {"goal", "sol1", "sol2"} <= set(first):
        return _choice(name, rows)
    fields = ("sentence1", "sentence2") if "sentence1" in first else ("sentence",)
    said = sorted({_label(where, row) for part in rows.values() for where, row in part})
    if len(said) < 2:
        raise InvalidRequest(f"{name} has one class only, {said[0]!r}; there is nothing to tell apart.")
    parts = {split: tuple(Example(_texts(where, row, fields), said.index(_label(where, row))) for where, row in part) for split, part in rows.items()}
    scored = {e.texts for e in parts["validation"]}
    train = tuple(e for e in parts["train"] if e.texts not in scored)  # GLUE repeats a few sentences; what is scored is not trained on
    return LabelledData(name, names or tuple(said), train, parts["validation"])


def _choice(name: str, rows: Mapping[str, Sequence[Row]]) -> LabelledData:
    parts: dict[str, tuple[Example, ...]] = {}
    for split, part in rows.items():
        wrong = next((f"{where} has the label {row['label']!r}" for where, row in part if _label(where, row) not in ("0", "1")), None)
        if wrong is not None:
            raise InvalidRequest(f"{wrong}; of two solutions it must be 0 or 1.")
        parts[split] = tuple(Example(_texts(where, row, ("sol1", "sol2")), int(_label(where, row)), *_texts(where, row, ("goal",))) for where, row in part)
    return LabelledData(name, ("first", "second"), parts["train"], parts["validation"], is_choice=True)


def _texts(where: str, row: Mapping[str, Any], fields: Iterable[str]) -> tuple[str, ...]:
    texts = tuple(row.get(field) for field in fields)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InvalidRequest(f"{where} lacks text: it needs {' and '.join(fields)}.")
    return texts  # type: ignore[return-value]


def _label(where: str, row: Mapping[str, Any]) -> str:
    label = row.get("label")
    if label is None or str(label).strip() in ("", "-1"):
        raise InvalidRequest(f"{where} has no label.")
    return str(label).strip()
