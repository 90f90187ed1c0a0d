"""How an SAE chooses the latents of a row: one file for each way, and their names in checkpoints and commands."""

from __future__ import annotations

from .adaptive import AdaptiveK
from .batch_topk import BatchTopK
from .jumprelu import JumpReLU
from .matryoshka import Matryoshka
from .need import Need
from .priced import Priced
from .selection import Chosen, Encoder, Selection
from .topk import TopK

SELECTIONS: dict[str, type[Selection]] = {
    cls.__name__: cls for cls in (TopK, BatchTopK, JumpReLU, Matryoshka, AdaptiveK, Need, Priced)
}
"""By the name that a checkpoint knows them by."""

__all__ = [
    "SELECTIONS",
    "AdaptiveK",
    "BatchTopK",
    "Chosen",
    "Encoder",
    "JumpReLU",
    "Matryoshka",
    "Need",
    "Priced",
    "Selection",
    "TopK",
]
