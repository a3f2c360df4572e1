"""Messages to token ids: prompt filters, chat template, limits of the context."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from jinja2 import TemplateError

from core.bundle import Bundle
from core.deadline import deadline
from core.errors import InvalidRequest, PromptTooLong

MAX_CHARACTERS = 1_000_000
TEMPLATE_SECONDS = 5.0


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Prompt:
    """What the model gets. `unfiltered_tokens` is the length it would have had without prompt filters."""

    ids: tuple[int, ...]
    text: str
    unfiltered_tokens: int


def has_visible_text(text: object) -> bool:
    """True when there is more than blanks, control and invisible characters."""
    return isinstance(text, str) and any(not ch.isspace() and unicodedata.category(ch) not in ("Cf", "Cc") for ch in text)


def clean_message(text: object) -> str:
    """A user's message without characters no tokenizer can take.

    Raises:
        InvalidRequest: not text, blank, or too long to tokenise.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"The message is {type(text).__name__}, not text.")
    if len(text) > MAX_CHARACTERS:
        raise InvalidRequest(f"The message has {len(text):,} characters; at most {MAX_CHARACTERS:,} are taken.")
    text = _encodable(text).replace("\0", "")
    if not has_visible_text(text):
        raise InvalidRequest("The message is empty. Type a question.")
    return text


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which no tokenizer takes, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def build_prompt(bundle: Bundle, messages: Sequence[Message]) -> Prompt:
    """Filter, render and tokenise a conversation that ends with the user's turn.

    A model with a chat template gets it; any other model gets the texts one after the other and goes on writing.

    Raises:
        InvalidRequest: the template refuses the conversation.
    """
    filtered: list[Message] = [
        {**m, "content": bundle.filter_prompt(m["content"])} if m["role"] == "user" else m for m in messages
    ]
    ids, text = _tokenise(bundle, filtered)
    unfiltered = len(ids) if filtered == list(messages) else len(_tokenise(bundle, messages)[0])
    return Prompt(tuple(ids), text, unfiltered)


def check_context(bundle: Bundle, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises PromptTooLong, with the numbers, when prompt and answer do not fit."""
    limit = bundle.context_length
    if prompt_tokens + max_new_tokens > limit:
        room = limit - prompt_tokens
        what = f"ask for at most {room} new tokens" if room > 0 else f"shorten the conversation by {-room + 1} tokens"
        raise PromptTooLong(
            f"The prompt has {prompt_tokens} tokens and {max_new_tokens} new ones are asked for; {bundle.info.model_id} takes {limit} in all. "
            f"Please {what}, or clear the chat."
        )


def _tokenise(bundle: Bundle, messages: Sequence[Message]) -> tuple[list[int], str]:
    tokenizer = bundle.tokenizer
    length = sum(len(m["content"]) for m in messages)
    if length > MAX_CHARACTERS:
        raise PromptTooLong(f"The conversation has {length:,} characters; at most {MAX_CHARACTERS:,} are taken. Clear the chat.")
    safe = [{"role": m["role"], "content": _defuse(bundle, _encodable(m["content"]))} for m in messages]
    if tokenizer.chat_template:
        try:
            with deadline(TEMPLATE_SECONDS, "The model's chat template"):
                text = str(tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise InvalidRequest(f"The model's chat template refuses this conversation: {error}") from error
        if len(text) > MAX_CHARACTERS + 2 * sum(len(m["content"]) for m in safe):
            raise InvalidRequest(f"The model's chat template made {len(text):,} characters of this conversation. Choose another model.")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        text = "\n".join(m["content"] for m in safe)
        ids = tokenizer(text, verbose=False)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
    return list(ids), text


def _defuse(bundle: Bundle, content: str) -> str:
    """Break special tokens that somebody typed, so that a message cannot pretend to be another turn."""
    added = (str(t) for t in bundle.tokenizer.added_tokens_decoder.values() if t.special)
    for token in sorted({*bundle.tokenizer.all_special_tokens, *added}, key=len, reverse=True):
        if len(token) > 1 and token in content:
            content = content.replace(token, f"{token[0]} {token[1:]}")
    return content
