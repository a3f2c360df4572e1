"""Named combinations: who is in, who is left out and why, on every model and with every catalog."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compression.quant.packed import Int8
from core.bundle import Bundle
from core.compatibility import compatible
from core.errors import InvalidRequest, UnsupportedModel
from core.technique import Technique
from engines import catalog
from engines.catalog import TECHNIQUES
from engines.chat import ChatRequest, ChatService, collect
from engines.combinations import PREFERRED, all_combined, offered_combinations
from engines.compare.offer import describe_methods
from engines.methods import BASELINE, expand_all, members_of, method_entry, method_name, method_names, parse_method
from engines.sampling import Sampling
from optim.larosa.technique import LaRoSA


def named(techniques: tuple[Technique, ...]) -> list[str]:
    return [t.name for t in techniques]


def test_all_combined_is_the_largest_set_that_goes_together() -> None:
    members = all_combined()
    chosen = set(named(members.techniques))
    assert compatible(members.techniques)
    assert chosen | set(members.excluded) == set(TECHNIQUES) and not chosen & set(members.excluded)
    assert {"native", "larosa", "int8", "vattention", "word_removal"} <= chosen
    assert not any(compatible([*members.techniques, TECHNIQUES[name]()]) for name in members.excluded)
    assert "a weight is stored in one form" in members.excluded["int4"]


def test_all_combined_leaves_out_what_the_model_refuses(family_bundle: Callable[[str], Bundle]) -> None:
    plain, post = family_bundle("llama"), family_bundle("opt_post_norm")
    assert "larosa" in named(members_of("all_combined", plain).techniques)
    refused = members_of("all_combined", post)
    assert "larosa" not in named(refused.techniques)
    assert "no rotation commutes" in refused.excluded["larosa"]
    assert compatible(refused.techniques)


def test_what_is_refused_makes_room_for_what_it_excludes(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Technique, bundle: Bundle) -> None:
        raise UnsupportedModel("not today")

    monkeypatch.setattr(Int8, "check", refuse)
    members = members_of("all_combined", llama)
    assert "int4" in named(members.techniques)
    assert members.excluded["int8"] == "not today"


def test_technique_added_later_is_in_without_a_change_here(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(LaRoSA):
        name = "later"

    monkeypatch.setitem(catalog.TECHNIQUES, "later", Later)
    assert "later" in named(parse_method("all_combined"))
    assert "later" in method_names()
    assert "later" in [m.name for m in describe_methods()]


def test_combination_is_offered_once_its_parts_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    class Part(Int8):
        pass

    assert "hybrid_kv_cache" not in offered_combinations()
    with pytest.raises(InvalidRequest, match="There is no method 'hybrid_kv_cache'"):
        parse_method("hybrid_kv_cache")
    for name in ("cake_loader", "cake_eviction"):
        monkeypatch.setitem(catalog.TECHNIQUES, name, type(name, (Part,), {"name": name}))
    assert sorted(named(parse_method("hybrid_kv_cache"))) == ["cake_eviction", "cake_loader", "vattention"]
    assert "word_removal" in named(parse_method("hybrid_kv_cache+word_removal"))


@pytest.mark.parametrize("typed", ["all_combined+word_removal", "word_removal+all_combined", "all_combined:every=3"])
def test_all_combined_stands_alone(typed: str) -> None:
    with pytest.raises(InvalidRequest, match="all_combined stands alone"):
        parse_method(typed)


def test_unknown_name_is_answered_with_all_names() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_method("chai")
    assert all(name in str(refusal.value) for name in method_names())
    assert "hybrid_kv_cache" not in str(refusal.value) and "mpo" not in str(refusal.value)


def test_preferred_techniques_are_in_the_catalog() -> None:
    assert set(PREFERRED) <= set(TECHNIQUES)


def test_entry_spells_the_members_out(llama: Bundle) -> None:
    entry = method_entry("all_combined", llama)
    assert method_name(parse_method(entry["spelled"])) == entry["spelled"]
    assert named(parse_method(entry["spelled"])) == entry["members"]
    assert method_entry(BASELINE) == {"method": BASELINE, "spelled": BASELINE, "members": [], "excluded": {}}


def test_all_stands_for_every_name() -> None:
    assert expand_all(["int8", "all"]) == ("int8", *(n for n in method_names() if n != "int8"))


def test_every_method_is_described() -> None:
    described = describe_methods()
    assert [m.name for m in described] == list(method_names())
    assert all(m.title and m.summary for m in described)
    assert described[0].members == () and described[-1].members == tuple(named(parse_method("all_combined")))


def test_chat_takes_all_combined_on_its_model(service: ChatService, family_checkpoint: Callable[[str], Path]) -> None:
    folder = str(family_checkpoint("opt_post_norm"))
    answers, errors = collect(service.stream(ChatRequest("What is rain?", ("baseline", "all_combined"), folder, dtype="float32", sampling=Sampling(4, ignore_eos=True))))
    assert errors == {}
    assert answers["all_combined"].method == method_entry("all_combined", service.pool.get(folder, dtype="float32").bundle)["spelled"]
    assert "larosa" not in answers["all_combined"].method
