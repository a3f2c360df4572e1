"""The contract of DESIGN.md over the catalog, over all pairs, and over techniques that break it on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from core.architectures import FAMILIES, REFUSED
from core.bundle import Bundle, ModelInfo
from core.compatibility import EXCLUDES, ORDERED, compatible, ordered
from core.errors import IncompatibleTechniques, UnsupportedModel
from core.technique import Effect, Stage, Technique
from engines.catalog import TECHNIQUES
from engines.engine import fused_engine
from tests import broken_techniques as broken
from tests import contract, families

BundleOf = Callable[[str], Bundle]
CATALOG = {name: kind for name, kind in TECHNIQUES.items() if kind.stage is not Stage.RUNTIME}
"""A runtime compiles what the others have made of a model; it has its own tests, tests/native."""
KINDS = [pytest.param(kind, id=name) for name, kind in CATALOG.items()]
PAIRS = [pytest.param(a, b, id=f"{a.name}-{b.name}") for a, b in combinations(CATALOG.values(), 2)]
COMPATIBLE = [pair for pair in PAIRS if compatible([kind() for kind in pair.values])]
# Llama shape with grouped heads, Conv1D weights, and the post-norm shape with projections around the blocks.
SHAPES = ("llama", "gpt2", "opt_post_norm")


def _admitted(families_: Iterable[str]) -> pytest.MarkDecorator:
    rows = [pytest.param(kind, family, id=f"{family}-{name}") for family in families_ for name, kind in CATALOG.items() if (family, name) not in REFUSED]
    return pytest.mark.parametrize(("kind", "family"), rows)


def _admitted_pairs() -> pytest.MarkDecorator:
    rows = [
        pytest.param(a, b, family, id=f"{family}-{a.name}-{b.name}")
        for family in SHAPES
        for a, b in combinations(CATALOG.values(), 2)
        if not {(family, a.name), (family, b.name)} & set(REFUSED)
    ]
    return pytest.mark.parametrize(("first", "second", "family"), rows)


for_every_admitted_family = _admitted(sorted(FAMILIES))
for_three_shapes = _admitted(SHAPES)
for_every_technique = pytest.mark.parametrize("kind", KINDS)
for_every_pair = _admitted_pairs()
for_every_compatible_pair = pytest.mark.parametrize(("first", "second"), COMPATIBLE)


@for_every_admitted_family
def test_neutral_setting_is_the_identity(kind: type[Technique], family: str, family_bundle: BundleOf) -> None:
    contract.check_neutral_is_identity(kind, family_bundle(family))


@for_every_admitted_family
def test_effect_is_what_the_technique_declares(kind: type[Technique], family: str, family_bundle: BundleOf) -> None:
    contract.check_effect_is_real(kind(), family_bundle(family))


@for_every_admitted_family
def test_undo_is_bit_exact(kind: type[Technique], family: str, family_bundle: BundleOf) -> None:
    contract.check_undo_is_exact(kind(), family_bundle(family))


@for_every_admitted_family
def test_report_names_what_was_touched(kind: type[Technique], family: str, family_bundle: BundleOf) -> None:
    contract.check_report(kind(), family_bundle(family))


@for_three_shapes
def test_failed_apply_leaves_the_bundle_as_found(kind: type[Technique], family: str, family_bundle: BundleOf) -> None:
    contract.check_undo_after_exception(kind(), family_bundle(family))


@for_three_shapes
def test_prepare_leaves_no_trace(kind: type[Technique], family: str, family_bundle: BundleOf) -> None:
    contract.check_prepare_leaves_no_trace(kind(), family_bundle(family))


@for_three_shapes
def test_engine_shares_weights_and_leaves_its_base_alone(kind: type[Technique], family: str, family_bundle: BundleOf) -> None:
    contract.check_engine_leaves_base_alone([kind()], family_bundle(family))


@for_every_technique
def test_prepared_survives_save_and_load(kind: type[Technique], llama: Bundle, tmp_path: Path) -> None:
    contract.check_prepared_survives_saving(kind(), llama, tmp_path)


@for_every_technique
def test_bf16_weights_keep_the_contract(kind: type[Technique], llama: Bundle) -> None:
    llama.model.to(torch.bfloat16)
    contract.check_neutral_is_identity(kind, llama)
    contract.check_effect_is_real(kind(), llama)
    contract.check_undo_is_exact(kind(), llama)


@for_every_technique
def test_technique_describes_itself(kind: type[Technique]) -> None:
    assert TECHNIQUES[kind.name] is kind
    assert kind.title and len(kind.summary) > 30 and kind.__doc__ and "Source:" in kind.__doc__
    assert (kind.counter is not None) == (kind.effect is Effect.LOSSLESS)
    assert kind() == kind(**kind().settings())
    assert kind().spell() == kind.name
    assert kind.neutral() != kind()


# Models a technique does not admit.


class _EmbeddingOnly(PreTrainedModel):
    """A causal language model without a single linear layer: the next token depends on the last one only."""

    config_class = families.LlamaConfig

    def __init__(self, config: families.LlamaConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, **ignored: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.table(input_ids))


@pytest.fixture
def embedding_only(tokenizer: PreTrainedTokenizerBase) -> Bundle:
    model = _EmbeddingOnly(families.make_config("llama", tokenizer)).eval()
    return Bundle(model, tokenizer, ModelInfo("embedding-only", None, "float32", "local"))


@for_every_technique
def test_unsupported_model_is_left_alone(kind: type[Technique], embedding_only: Bundle) -> None:
    contract.check_unsupported_is_left_alone(kind(), embedding_only)


@pytest.mark.parametrize(("family", "name"), sorted(REFUSED))
def test_refused_family_is_named_with_the_reason_and_left_alone(family: str, name: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    before = contract.snapshot(bundle)
    with pytest.raises(UnsupportedModel, match=REFUSED[family, name]):
        fused_engine(bundle, [TECHNIQUES[name]()])
    contract.assert_unchanged(before, bundle, "refused")


@pytest.mark.parametrize("name", ["bnb_int8", "bnb_nf4"])
def test_quantisation_refuses_a_model_without_linear_layers(name: str, embedding_only: Bundle) -> None:
    before = contract.snapshot(embedding_only)
    with pytest.raises(UnsupportedModel, match=f"{name}: embedding-only has no full-precision linear layer"):
        fused_engine(embedding_only, [TECHNIQUES[name]()])
    contract.assert_unchanged(before, embedding_only, "refused")


# Pairs.


@for_every_pair
def test_pair_works_in_both_orders_or_is_refused(first: type[Technique], second: type[Technique], family: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    reason = EXCLUDES.get(frozenset({first.name, second.name}))
    if reason:
        contract.check_incompatible([first(), second()], bundle, reason)
        contract.check_incompatible([second(), first()], bundle, reason)
        return
    early, late = ordered([first(), second()])
    contract.check_pair(early, late, bundle)
    if frozenset({first.name, second.name}) in ORDERED:
        with late.apply(bundle, late.prepare(bundle)):
            before = contract.snapshot(bundle)
            with pytest.raises(UnsupportedModel):
                early.check(bundle)
            contract.assert_unchanged(before, bundle, "refused in the wrong order")
    else:
        contract.check_pair(late, early, bundle)
    contract.check_engine_leaves_base_alone([second(), first()], bundle)


@for_every_compatible_pair
def test_pair_whose_second_apply_fails_leaves_the_first_in_effect(first: type[Technique], second: type[Technique], llama: Bundle) -> None:
    before = contract.snapshot(llama)
    with contract.apply(first(), llama):
        contract.check_undo_after_exception(second(), llama)
    contract.assert_unchanged(before, llama, "both undone")


@for_every_compatible_pair
def test_engine_is_the_same_whatever_order_techniques_are_named_in(first: type[Technique], second: type[Technique], llama: Bundle) -> None:
    one, two = fused_engine(llama, [first(), second()]), fused_engine(llama, [second(), first()])
    assert one.method == two.method
    assert [r.technique for r in one.reports] == [r.technique for r in two.reports] == [t.name for t in ordered([second(), first()])]
    assert torch.equal(contract.logits_of(one.bundle), contract.logits_of(two.bundle))


def test_excluded_pairs_name_techniques_of_the_catalog() -> None:
    for pair, reason in EXCLUDES.items():
        assert len(pair) == 2 and pair <= set(TECHNIQUES), f"{set(pair)} is not a pair of the catalog"
        assert len(reason) > 20


@for_every_technique
def test_the_same_technique_twice_is_refused(kind: type[Technique], llama: Bundle) -> None:
    contract.check_incompatible([kind(), kind()], llama, "twice")
    with pytest.raises(IncompatibleTechniques, match=f"{kind.name} is given twice"):
        ordered([kind(), kind()])


def test_engine_whose_second_technique_is_refused_leaves_the_base_alone(llama: Bundle) -> None:
    before = contract.snapshot(llama)
    with pytest.raises(UnsupportedModel):
        fused_engine(llama, [broken.RefusesTooLate(), TECHNIQUES["word_removal"]()])
    contract.assert_unchanged(before, llama, "refused engine")


# The contract itself: sound techniques pass, each broken one is caught by the function that is there for it.


def test_contract_accepts_a_sound_technique(llama: Bundle, tmp_path: Path) -> None:
    contract.check_neutral_is_identity(broken.Sound, llama)
    contract.check_effect_is_real(broken.Sound(), llama)
    contract.check_undo_is_exact(broken.Sound(), llama)
    contract.check_undo_after_exception(broken.Sound(), llama)
    contract.check_prepare_leaves_no_trace(broken.Sound(), llama)
    contract.check_report(broken.Sound(), llama)
    contract.check_engine_leaves_base_alone([broken.Sound()], llama)
    contract.check_prepared_survives_saving(broken.Sound(), llama, tmp_path)
    contract.check_pair(broken.Sound(), TECHNIQUES["word_removal"](), llama)


CACHES = {"caches_made": lambda bundle: float(broken.CountedCache.made)}


def test_contract_accepts_a_sound_lossless_technique(llama: Bundle) -> None:
    contract.check_effect_is_real(broken.Lossless(), llama, CACHES)
    contract.check_undo_is_exact(broken.Lossless(), llama)
    contract.check_report(broken.Lossless(), llama)
    contract.check_pair(broken.Lossless(), broken.Sound(), llama)


@pytest.mark.parametrize(("check", "bad", "said"), [
    (contract.check_effect_is_real, broken.DoesNothing(), "changes nothing"),
    (contract.check_undo_is_exact, broken.UndoByDivision(), "values of parameter model.norm.weight changed"),
    (contract.check_undo_is_exact, broken.UndoForgetsHook(), "module 'model.norm' is not what it was"),
    (contract.check_undo_is_exact, broken.UndoTwiceBreaks(), "second undo"),
    (contract.check_undo_after_exception, broken.ResidueOnError(), "is not what it was"),
    (contract.check_undo_after_exception, broken.UndoByDivision(), "nothing through core.reversible"),
    (contract.check_undo_after_exception, broken.SwallowsErrors(), "swallows an error"),
    (contract.check_prepare_leaves_no_trace, broken.MutatesInPrepare(), "values of parameter model.norm.weight changed"),
    (contract.check_prepare_leaves_no_trace, broken.HooksInPrepare(), "is not what it was"),
    (contract.check_report, broken.ReportsNothing(), "reports nothing touched"),
    (contract.check_report, broken.ReportsTooMuch(), "which it did not change"),
    (contract.check_report, broken.ReportsTooLittle(), "does not report it"),
    (contract.check_report, broken.BytesLie(), "misreports bytes_after"),
    (contract.check_report, broken.SavesNoBytes(), "bytes"),
    (contract.check_unsupported_is_left_alone, broken.RefusesTooLate(), "configuration changed"),
], ids=lambda value: value.name if isinstance(value, Technique) else None)
def test_contract_catches_a_broken_technique(check: Callable[[Technique, Bundle], None], bad: Technique, said: str, llama: Bundle) -> None:
    with pytest.raises(AssertionError, match=said):
        check(bad, llama)


@pytest.mark.parametrize(("bad", "said"), [(broken.NotNeutral, "changes the logits"), (broken.NoNeutral, "has no neutral setting")])
def test_contract_catches_a_neutral_setting_that_is_none(bad: type[Technique], said: str, llama: Bundle) -> None:
    with pytest.raises(AssertionError, match=said):
        contract.check_neutral_is_identity(bad, llama)


@pytest.mark.parametrize(("bad", "said"), [
    (broken.LosslessThatLoses(), "called lossless and changes the logits"),
    (broken.LosslessThatIdles(), "its counter caches_made stays"),
], ids=lambda value: value.name if isinstance(value, Technique) else None)
def test_contract_catches_a_lossless_technique_that_is_not(bad: Technique, said: str, llama: Bundle) -> None:
    with pytest.raises(AssertionError, match=said):
        contract.check_effect_is_real(bad, llama, CACHES)


def test_contract_catches_a_counter_it_cannot_read(llama: Bundle) -> None:
    with pytest.raises(AssertionError, match="cannot read"):
        contract.check_effect_is_real(broken.Lossless(), llama, {})


@pytest.mark.parametrize(("bad", "said"), [
    (broken.ChangesSharedWeights(), "values of parameter model.norm.weight changed"),
    (broken.CopiesWeights(), "down_proj.weight was copied"),
], ids=lambda value: value.name if isinstance(value, Technique) else None)
def test_contract_catches_an_engine_that_is_not_apart_from_its_base(bad: Technique, said: str, llama: Bundle) -> None:
    with pytest.raises(AssertionError, match=said):
        contract.check_engine_leaves_base_alone([bad], llama)


def test_contract_catches_a_preparation_that_is_not_in_its_file(llama: Bundle, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a saved Prepared gives other logits"):
        contract.check_prepared_survives_saving(broken.ForgetsPrepared(), llama, tmp_path)


def test_contract_catches_a_pair_in_which_one_does_nothing(llama: Bundle) -> None:
    with pytest.raises(AssertionError, match="does_nothing does nothing once word_removal is on"):
        contract.check_pair(TECHNIQUES["word_removal"](), broken.DoesNothing(), llama)


def test_contract_catches_a_pair_that_should_have_been_refused(llama: Bundle) -> None:
    with pytest.raises(AssertionError, match="were applied together"):
        contract.check_incompatible([broken.Sound(), TECHNIQUES["word_removal"]()], llama, "never")
