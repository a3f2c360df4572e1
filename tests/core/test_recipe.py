"""Recipes: what is saved is what is loaded; what is no recipe is refused in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compression.quant.technique import BnbNf4
from core.errors import InvalidRequest
from core.recipe import SCHEMA_VERSION, Recipe

FULL = Recipe("owner/name", "main", ({"name": "word_removal", "every": 4}, {"name": "bnb_nf4", **BnbNf4(share=0.5).settings()}), {"larosa": "out/larosa.safetensors"})
VALUES = st.one_of(st.integers(-(10**6), 10**6), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text(max_size=8), st.none())
TECHNIQUE = st.dictionaries(st.text(min_size=1, max_size=6), VALUES, max_size=3).map(lambda d: {**d, "name": "x"})


@pytest.mark.parametrize("recipe", [FULL, Recipe("embedded"), Recipe("ünïcode/模型", "é")], ids=["full", "bare", "unicode"])
def test_saved_recipe_loads_equal(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == recipe


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=st.builds(Recipe, st.text(max_size=20), st.none() | st.text(max_size=9), st.lists(TECHNIQUE, max_size=4).map(tuple), st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3)))
def test_any_recipe_survives_the_file(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == recipe


def test_file_is_readable_json_with_its_schema(tmp_path: Path) -> None:
    FULL.save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["schema"] == SCHEMA_VERSION and data["model_id"] == "owner/name" and data["techniques"][0] == {"name": "word_removal", "every": 4}


def test_saving_leaves_no_other_file(tmp_path: Path) -> None:
    FULL.save(tmp_path / "r.json")
    FULL.save(tmp_path / "r.json")
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_saving_that_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FULL.save(tmp_path / "r.json")
    with pytest.raises(TypeError):
        Recipe("other", techniques=({"name": "x", "value": object()},)).save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == FULL

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError):
        Recipe("other").save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == FULL


@pytest.mark.parametrize(("text", "said"), [
    ("{", r"r\.json is not JSON: line 1"), ('{"schema": 1,\n oops}', "line 2"), ("", "not JSON"),
    ("[1]", "not a recipe of schema 1"), ("null", "not a recipe"), ('"text"', "not a recipe"), ("{}", "not a recipe"),
    ('{"schema": 2, "model_id": "a"}', "not a recipe of schema 1"), ('{"schema": "1", "model_id": "a"}', "not a recipe"),
    ('{"schema": 1}', "model_id is missing or no text"), ('{"schema": 1, "model_id": 5}', "model_id is missing or no text"),
    ('{"schema": 1, "model_id": "a", "techniques": [{}]}', "technique without a name"),
    ('{"schema": 1, "model_id": "a", "techniques": ["bnb_int8"]}', "technique without a name"),
    ('{"schema": 1, "model_id": "a", "techniques": {"name": "x"}}', "technique without a name"),
    pytest.param('{"schema": 1, "model_id": "a", "techniques": 5}', "techniques"),
    pytest.param('{"schema": 1, "model_id": "a", "techniques": null}', "techniques"),
    pytest.param('{"schema": 1, "model_id": "a", "techniques": [{"name": 5}]}', "name"),
    pytest.param('{"schema": 1, "model_id": "a", "prepared": [1]}', "prepared"),
    pytest.param('{"schema": 1, "model_id": "a", "revision": 5}', "revision"),
])
def test_what_is_no_recipe_is_refused_in_words(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InvalidRequest, match=said):
        Recipe.load(tmp_path / "r.json")


def test_binary_file_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(InvalidRequest):
        Recipe.load(tmp_path / "r.json")


def test_missing_file_and_folder_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        Recipe.load(tmp_path / "none.json")
    with pytest.raises(InvalidRequest, match="cannot be read: Is a directory"):
        Recipe.load(tmp_path)
