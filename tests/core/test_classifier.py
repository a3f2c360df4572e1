"""Classifiers: loading from checkpoints of the real architectures, logits that do not depend on batching, and the figures against hand calculations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, OPTForSequenceClassification, PreTrainedTokenizerBase

from core.classifier import Classifier, accuracy, class_logits, encode, load_classifier, mcnemar, padded
from core.errors import InvalidRequest, ModelLoadError
from core.labelled_data import Example, load_labelled
from engines.embedded.classifier_tuning import ClassifierPlan, save_classifier, tune_classifier, validate

EXAMPLES = [Example((text,), i % 2) for i, text in enumerate(["the fox", "a model predicts the next word", "climate", "it is not magic, and nobody should say so"])]
LABELS = ("negative", "positive")


@pytest.fixture
def opt_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    return saved(OPTForCausalLM(opt_config(tokenizer)), tokenizer, tmp_path / "opt")


def opt_config(tokenizer: PreTrainedTokenizerBase, **changes: object) -> OPTConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32} | changes
    return OPTConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **sizes)


def saved(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def test_language_model_gets_a_new_head_and_says_so(opt_folder: Path) -> None:
    classifier = load_classifier(str(opt_folder), LABELS)
    assert classifier.head_is_new and classifier.labels == LABELS
    assert class_logits(classifier, EXAMPLES).shape == (4, 2)


def test_post_norm_350m_shape_loads_and_sorts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = opt_config(tokenizer, do_layer_norm_before=False, word_embed_proj_dim=16)
    classifier = load_classifier(str(saved(OPTForCausalLM(config), tokenizer, tmp_path / "opt350")), LABELS)
    assert np.isfinite(class_logits(classifier, EXAMPLES)).all()


def test_trained_head_is_read_and_its_classes_must_fit(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = OPTForSequenceClassification(opt_config(tokenizer, num_labels=3))
    folder = saved(model, tokenizer, tmp_path / "three")
    with pytest.raises(InvalidRequest, match="3 classes apart, the data set has 2"):
        load_classifier(str(folder), LABELS)
    classifier = load_classifier(str(folder), ("a", "b", "c"))
    assert not classifier.head_is_new
    assert torch.equal(classifier.model.score.weight, model.score.weight)  # type: ignore[union-attr]


def test_checkpoint_that_lacks_weights_is_refused(opt_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(opt_folder / "model.safetensors")
    weights.pop(next(name for name in weights if "fc1.weight" in name))
    save_file(weights, opt_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="lacks 1 weights"):
        load_classifier(str(opt_folder), LABELS)


def test_logits_do_not_depend_on_what_stands_beside_a_text(opt_folder: Path) -> None:
    classifier = load_classifier(str(opt_folder), LABELS)
    alone = np.concatenate([class_logits(classifier, [e]) for e in EXAMPLES])
    assert np.abs(class_logits(classifier, EXAMPLES, batch=4) - alone).max() < 1e-5
    assert np.abs(class_logits(classifier, EXAMPLES, batch=3) - alone).max() < 1e-5


def test_logits_are_those_of_the_last_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    classifier = load_classifier(str(saved(LlamaForCausalLM(config), tokenizer, tmp_path / "llama")), LABELS)
    for example, got in zip(EXAMPLES, class_logits(classifier, EXAMPLES), strict=True):
        ids = torch.tensor(encode(classifier, [example]))
        wanted = classifier.model.score(classifier.model.model(ids).last_hidden_state[0, -1])  # type: ignore[operator, union-attr]
        assert np.abs(wanted.detach().numpy() - got).max() < 1e-5


def test_pairs_are_read_together_and_long_texts_are_cut(opt_folder: Path) -> None:
    classifier = load_classifier(str(opt_folder), LABELS)
    pair, joined = encode(classifier, [Example(("the fox", "a dog"), 0), Example(("the fox\na dog",), 0)])
    assert pair == joined
    assert len(encode(classifier, [Example(("word " * 500,), 0)])[0]) == 64 == classifier.max_tokens


def test_padding_is_on_the_right() -> None:
    ids, mask = padded([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_accuracy_and_calibration_by_hand() -> None:
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.35, 0.65], [0.65, 0.35]], dtype=np.float32))
    got = accuracy(logits, [0, 1, 1, 0])
    assert got.correct == 3 and got.examples == 4 and got.share == 0.75
    assert got.calibration_error == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(1 - 0.65), abs=1e-6)
    assert got.interval[0] < 0.75 < got.interval[1]


@pytest.mark.parametrize("logits", [np.zeros((0, 2), np.float32), np.full((2, 2), np.nan, np.float32), np.zeros((3, 2), np.float32)])
def test_accuracy_of_nothing_is_refused(logits: np.ndarray) -> None:
    with pytest.raises(InvalidRequest, match="finite logits"):
        accuracy(logits, [0, 1] if len(logits) else [])


def test_mcnemar_is_the_exact_binomial_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(300) < 0.9, rng.random(300) < 0.8
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    assert mcnemar(a, b) == pytest.approx(binomtest(only_a, only_a + only_b).pvalue, rel=1e-9)
    assert mcnemar(a, a) == 1.0


def test_tuning_learns_and_what_is_saved_scores_the_same(opt_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = [f"{word} {filler}\t{label}\n" for word, label in (("fox", 1), ("climate", 0)) for filler in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
    for split, part in (("train", lines[::2]), ("validation", lines[1::2])):
        (tmp_path / "data" / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(part), encoding="utf-8")
    data = load_labelled(str(tmp_path / "data"))
    classifier = load_classifier(str(opt_folder), data.labels)
    plan = ClassifierPlan(epochs=25, learning_rate=5e-3, batch=4, word_dropout=0.0)
    report = tune_classifier(classifier, data, plan)
    assert validate(classifier, data).share == 1.0
    assert not any(p.requires_grad for p in classifier.model.parameters())
    written = save_classifier(classifier, data, plan, report, tmp_path / "out", "tiny")
    again = load_classifier(str(tmp_path / "out"), data.labels, dtype="bfloat16")
    assert not again.head_is_new and validate(again, data) == written
    assert f"{written.share:.1%}" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("changes", "message"), [({"epochs": 0}, "epochs is 0"), ({"word_dropout": 1.0}, "word_dropout"), ({"learning_rate": float("nan")}, "learning_rate is nan"), ({"learning_rate": 0.0}, "learning_rate is 0")])
def test_bad_plan_is_refused(changes: dict[str, float], message: str, opt_folder: Path) -> None:
    data = load_labelled("embedded")
    classifier: Classifier = load_classifier(str(opt_folder), data.labels)
    before = {name: p.clone() for name, p in classifier.model.named_parameters()}
    with pytest.raises(InvalidRequest, match=message):
        tune_classifier(classifier, data, ClassifierPlan(**({"limit": 8} | changes)))  # type: ignore[arg-type]
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in classifier.model.named_parameters())
