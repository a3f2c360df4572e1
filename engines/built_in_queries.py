"""The five questions that every comparison can start from, with the words that a good answer holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    """A built-in question. keywords: stems are looked for in the answer, as `keyword_recall` does."""

    kind: str
    question: str
    keywords: tuple[str, ...]


AI_TEXT = (
    "Artificial intelligence is the branch of computing that builds systems able to perform tasks which usually call for human judgement. Machine learning is its most "
    "productive part today. Instead of writing every rule by hand, engineers show a model many examples, and an algorithm adjusts the model's parameters until its predictions "
    "match the data. Deep learning stacks many layers of simple units into neural networks, which recognise images, transcribe speech and translate between languages. Large "
    "language models are trained on enormous collections of text and can answer questions, write summaries and draft computer programs. The same methods help doctors read scans, "
    "help banks notice fraud and help farmers plan irrigation. They also bring risks. A model repeats the bias of its training data, may state false things with confidence, and "
    "consumes much energy during training. Careful testing, open evaluation and human oversight are therefore part of every responsible deployment."
)
CLIMATE_TEXT = (
    "Climate change describes the long-term shift in temperature, rainfall and wind that the Earth has experienced since industry began. Its main cause is the burning of coal, oil "
    "and gas, which releases carbon dioxide into the air. Carbon dioxide and other greenhouse gases trap heat that would otherwise escape to space, so the surface, the air and the "
    "oceans warm. Warmer water expands and melting ice sheets add to it, so the sea level rises and threatens low coasts. Heat waves, droughts and heavy rain become more frequent, "
    "and plants and animals must move or adapt. Cutting emissions is the surest remedy. Wind and solar power replace fossil fuels, better insulation saves heat, and forests store "
    "carbon as they grow. Some warming can no longer be avoided, so cities also build dikes, plant trees for shade and prepare their water supply for dry summers. Every tenth of a degree counts."
)

BUILT_IN = (
    Query("definition", "What is artificial intelligence?", ("computer", "machine", "human", "learning", "tasks")),
    Query("explanation", "Explain quantum mechanics in simple terms.", ("particle", "wave", "atom", "energy", "measur", "probab")),
    Query("how it works", "How does machine learning work?", ("data", "example", "model", "train", "predict", "pattern")),
    Query("summary", f"Summarise this text: {AI_TEXT}", ("intelligence", "learning", "model", "data", "neural", "risk")),
    Query("summary", f"Summarise this text: {CLIMATE_TEXT}", ("climate", "carbon", "emission", "warm", "sea", "heat")),
)
