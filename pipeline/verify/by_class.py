"""Per-class accuracy of the dense network and the artifact: the average hides that a rare class was lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .statistics import paired_ci95

LARGE_PP = 5.0  # points of a class's recall that are worth a remark, where the interval excludes 0
CONFUSIONS = 5  # that are kept
Counts = Mapping[str, tuple[int, int, int, int]]


def by_class(
    labels: NDArray[np.int64], dense: NDArray[np.bool_], artifact: NDArray[np.bool_], names: Sequence[str]
) -> dict[str, tuple[int, int, int, int]]:
    """Returns, for each class, the counts of test samples: all, correct by the dense network, by the artifact, by the dense only.

    Args:
        labels: class of each sample (n,).
        dense: whether the dense network is right (n,).
        artifact: whether the artifact is right (n,).
        names: of the classes; without them they are numbered.
    """
    found = {}
    for label in np.unique(labels):
        own = labels == label
        counts = own, own & dense, own & artifact, own & dense & ~artifact
        samples, right, still, lost = (int(np.count_nonzero(each)) for each in counts)
        found[names[label] if 0 <= label < len(names) else str(label)] = samples, right, still, lost
    return found


def confused(
    labels: NDArray[np.int64], dense: NDArray[np.int64], artifact: NDArray[np.int64], names: Sequence[str]
) -> tuple[tuple[str, str, int, int], ...]:
    """Returns the confusions that rose most: class, wrong prediction, how often by the dense network and by the artifact.

    Args:
        labels: class of each sample (n,).
        dense: class that the dense network predicts (n,); -1 where its scores have a NaN, which is not counted.
        artifact: class that the artifact predicts (n,), likewise.
        names: of the classes; without them they are numbered.
    """

    def counted(predicted: NDArray[np.int64]) -> Counter[tuple[int, int]]:
        wrong = (labels != predicted) & (predicted >= 0)
        return Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))

    def named(label: int) -> str:
        return names[label] if 0 <= label < len(names) else str(label)

    before, after = counted(dense), counted(artifact)
    risen = sorted(after - before, key=lambda pair: (before[pair] - after[pair], pair))[:CONFUSIONS]
    return tuple((named(label), named(other), before[label, other], after[label, other]) for label, other in risen)


def worst(classes: Counts) -> list[tuple[str, float, tuple[float, float]]]:
    """Returns each class with its drop of recall in points and the 95 % interval (Tango's); the largest drop first."""

    def lost(counts: tuple[int, int, int, int]) -> tuple[float, tuple[float, float]]:
        samples, dense, artifact, only = counts
        return 100.0 * (dense - artifact) / samples, paired_ci95(only, only - (dense - artifact), samples)

    found = [(name, *lost(counts)) for name, counts in classes.items()]
    return sorted(found, key=lambda entry: -entry[1])


def remarks(target: str, classes: Counts) -> Iterator[str]:
    """Yields a warning on the class with the largest drop of recall, where its interval excludes 0."""
    for name, points, (low, high) in worst(classes)[:1]:
        samples, dense, artifact, _ = classes[name]
        if points >= LARGE_PP and low > 0:
            yield (
                f"{target}: class {name!r} lost most: {dense} of its {samples} test samples were right, now {artifact}"
                f" ({points:.1f} points, 95 % interval {low:.1f} to {high:.1f})."
            )
