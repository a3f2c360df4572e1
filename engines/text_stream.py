"""Token ids to text as they come, for any tokenizer."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


class TextStream:
    """Gives out the text that each new token completes; bytes of an unfinished character are held back.

    A token's text depends on those before it (leading blanks, multi-byte characters), so each step decodes a short
    window with and without the new token and returns the difference.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._given = 0

    def push(self, token: int) -> str:
        """The text that `token` adds, empty while a character is unfinished."""
        self._ids.append(token)
        before = self._decode(self._start, self._given)
        after = self._decode(self._start, len(self._ids))
        if after.endswith(_UNFINISHED) and len(self._ids) - self._given < 8:
            return ""
        piece = after[len(before) :]
        if piece:  # from here on the last piece is context enough; a special token alone would not be
            self._start = self._given
        self._given = len(self._ids)
        return piece

    def flush(self) -> str:
        """What was held back at the end of the answer."""
        rest = self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._given)) :]
        self._given = len(self._ids)
        return rest

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
