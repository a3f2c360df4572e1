"""A tiny llama chat model with its own tokenizer, and services over it. Nothing here reaches the network."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from core.bundle import Bundle
from core.loading import load_bundle
from engines.chat import ChatRequest, ChatService
from engines.embedded.tokenizer import train_tokenizer
from engines.pool import EnginePool
from engines.sampling import Sampling

TEXTS = (
    "What is artificial intelligence? It is the study of machines that learn from examples.",
    "Explain quantum mechanics in simple terms, with the words of a teacher who has a little time.",
    "How does machine learning work? A model is shown many examples, and it changes until it makes fewer mistakes.",
    "Die Wärme der Erde steigt seit langer Zeit, и мы это измерили. 人工智能很有用。😀",
)
CONTEXT, VOCAB, LAYERS, HEADS, KV_HEADS, HIDDEN, MLP = 256, 384, 2, 4, 2, 64, 128
QUESTION = "Please explain to me in a few simple words how the small machines learn from many examples of the past"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, and other work shares this machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> Iterator[None]:
    """The pool collects garbage at each load; without the imported libraries' objects that takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of shared models and data beside the checkout."""
    return Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS * 4, VOCAB)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A saved llama chat model with grouped heads and tied embeddings. Weights are wide, so that no two logits nearly tie."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_bundle(model_folder: Path) -> Bundle:
    """The tiny model in fp32, for tests that only read it."""
    return load_bundle(str(model_folder))


@pytest.fixture
def bundle(model_folder: Path) -> Bundle:
    """The tiny model in fp32, freshly loaded."""
    return load_bundle(str(model_folder))


@pytest.fixture
def pool() -> EnginePool:
    return EnginePool()


@pytest.fixture
def service(pool: EnginePool) -> ChatService:
    return ChatService(pool)


@pytest.fixture
def make_request(model_folder: Path) -> Callable[..., ChatRequest]:
    """Makes a request to the tiny model; everything but the methods has a default."""

    def make(*methods: str, message: str = QUESTION, max_new_tokens: int = 12, **settings: object) -> ChatRequest:
        sampling = settings.pop("sampling", Sampling(max_new_tokens=max_new_tokens, ignore_eos=True))
        return ChatRequest(message, methods or ("baseline",), str(model_folder), **{"dtype": "float32", "sampling": sampling, **settings})  # type: ignore[arg-type]

    return make
