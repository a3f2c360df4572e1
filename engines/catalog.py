"""Every built technique, by name. A new one is added here and nowhere else."""

from __future__ import annotations

from compression.quant.technique import BnbInt8, BnbNf4
from core.technique import Technique
from optim.larosa.technique import LaRoSA
from optim.word_removal.technique import WordRemoval

TECHNIQUES: dict[str, type[Technique]] = {t.name: t for t in (WordRemoval, BnbInt8, BnbNf4, LaRoSA)}
