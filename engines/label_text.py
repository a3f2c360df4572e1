"""What the labels of results claim, in words."""

from __future__ import annotations

LABELS = {
    "simulated": "Computed as if; nothing is saved yet.",
    "stored": "Held smaller in memory, unpacked to compute.",
    "executed": "The machine computes with the smaller form.",
}
REFERENCE = "The unmodified model, in the faster of float32 and bfloat16."
MIXED = "Several techniques with different labels; each is named below."
