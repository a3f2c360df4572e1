"""Every built technique, by name. A new one is added here and nowhere else."""

from __future__ import annotations

from compression.quant.packed import Int4, Int8
from compression.quant.technique import BnbInt8, BnbNf4
from core.technique import Technique
from engines.native.technique import NativeRuntime
from optim.larosa.technique import LaRoSA
from optim.vattention.technique import VAttention
from optim.word_removal.technique import WordRemoval

TECHNIQUES: dict[str, type[Technique]] = {t.name: t for t in (WordRemoval, LaRoSA, Int8, Int4, BnbInt8, BnbNf4, VAttention, NativeRuntime)}
