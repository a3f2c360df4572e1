"""Word removal as a technique: a prompt filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from core.bundle import Bundle
from core.reversible import Edits
from core.technique import Effect, Label, Prepared, Report, Stage, Technique, option
from optim.word_removal.ops import remove_words


@dataclass(frozen=True)
class WordRemoval(Technique):
    """Drop every n-th word of what the user says before it is tokenised.

    Source: "word removal" of the Comprehensive LLM Optimization System, feature F7.
    Deviates: numbers, names, negations, ends of sentences and code stay; there the next word goes instead.
    """

    name: ClassVar[str] = "word_removal"
    title: ClassVar[str] = "Word removal"
    summary: ClassVar[str] = "Drops every n-th word of your message; names, numbers, negations and sentence ends stay. Fewer prompt tokens."
    effect: ClassVar[Effect] = Effect.LOSSY
    stage: ClassVar[Stage] = Stage.PROMPT

    every: int = option(3, "Drop every n-th word (0: none)", choices=(0, 3, 4, 5), neutral=0)
    minimum_words: int = option(6, "Leave shorter messages whole", minimum=0, maximum=1000, step=1)

    def __call__(self, text: str) -> str:
        """The text without the words this configuration drops."""
        return remove_words(text, self.every, self.minimum_words).text

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        edits.set_attr(bundle, "prompt_filters", (*bundle.prompt_filters, self))
        note = f"messages of fewer than {self.minimum_words} words stay whole"
        return Report(self.name, Label.EXECUTED, ("prompt_filters",), notes=(note,)), ()
