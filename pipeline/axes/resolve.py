"""From what the operators said about labels to prime labels: which positions go together, which stay, and why.

Ties are connected components. A product with one factor left that can shrink is a tie too; with two or more it says that its
vector goes with any of them, so that a vector resolves to the set of its primes. Two products over the same labels are made to
agree, by joining equal factors or by keeping the smallest factor whole, and what is frozen spreads until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .algebra import Atom, Labels, Product, Store

ROUNDS = 200
TWO_WAYS = "axis regrouped in two ways"


@dataclass
class Resolved:
    """Primes of every label, and the reason of those that stay."""

    component: NDArray[np.int64]  # label -> component
    primes: dict[int, tuple[int, ...]]  # components that are products -> their primes; all others are their own
    reasons: dict[int, str]  # frozen components
    products: tuple[Product, ...] = ()  # those with two factors or more that can shrink

    def of(self, labels: Labels) -> list[tuple[int, ...]]:
        """The primes at each position of a vector of labels."""
        return [self.primes.get(int(c), (int(c),)) for c in self.component[labels]]

    def stays(self, label: int) -> str | None:
        """Why a label stays in the network, or None."""
        return self.reasons.get(int(self.component[label]))


def resolve(store: Store) -> Resolved:
    """Which labels are one, which are products of others, and which stay."""
    edges = list(store.ties)
    frozen: list[tuple[Labels, str]] = list(store.frozen)
    products = list(store.products)
    for _ in range(ROUNDS):
        component = _components(store.count, edges)
        reasons = _reasons(component, frozen)
        still = np.zeros(int(component.max(initial=-1)) + 1, dtype=bool)
        still[list(reasons)] = True
        before = len(edges), len(frozen), len(products)
        products = [p for p in products if not _simplified(p, component, still, reasons, edges, frozen)]
        products = _reconciled(products, component, still, edges, frozen)
        if (len(edges), len(frozen), len(products)) == before:
            break
    else:  # freeze what never settled: less can be removed, and nothing is wrong
        for product in products:
            frozen += [(a.labels, TWO_WAYS) for a in product.factors if a.labels is not None]
            frozen.append((product.vector, TWO_WAYS))
        component = _components(store.count, edges)
        reasons, products = _reasons(component, frozen), []
    return Resolved(component, _primes(products, component), reasons, tuple(products))


def _components(count: int, edges: list[tuple[Labels, Labels]]) -> NDArray[np.int64]:
    if not count:
        return np.zeros(0, dtype=np.int64)
    a = np.concatenate([e[0] for e in edges]) if edges else np.zeros(0, dtype=np.int64)
    b = np.concatenate([e[1] for e in edges]) if edges else np.zeros(0, dtype=np.int64)
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(count, count))
    component: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return component


def _reasons(component: NDArray[np.int64], frozen: list[tuple[Labels, str]]) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for labels, reason in frozen:
        for c in np.unique(component[labels]):
            reasons.setdefault(int(c), reason)
    return reasons


def _index(product: Product) -> list[NDArray[np.int64]]:
    """Position of each factor for each position of the vector."""
    shape = tuple(a.size for a in product.factors)
    return [i.astype(np.int64) for i in np.unravel_index(np.arange(len(product.vector)), shape)]


def _free(atom: Atom, component: NDArray[np.int64], still: NDArray[np.bool_]) -> bool:
    return atom.labels is not None and not bool(still[component[atom.labels]].all())


def _simplified(
    product: Product,
    component: NDArray[np.int64],
    still: NDArray[np.bool_],
    reasons: dict[int, str],
    edges: list[tuple[Labels, Labels]],
    frozen: list[tuple[Labels, str]],
) -> bool:
    """Whether a product has become ties and can be forgotten."""
    index, vector = _index(product), component[product.vector]
    stuck = still[vector]
    if stuck.any():
        reason = reasons[int(vector[stuck][0])]
        for atom, where in zip(product.factors, index, strict=True):
            if atom.labels is not None and not still[component[atom.labels[where[stuck]]]].all():
                frozen.append((atom.labels[np.unique(where[stuck])], reason))
    free = [k for k, atom in enumerate(product.factors) if _free(atom, component, still)]
    if len(free) > 1:
        return False
    if free:
        labels = product.factors[free[0]].labels
        assert labels is not None
        edges.append((product.vector, labels[index[free[0]]]))
    else:
        kept = [component[a.labels] for a in product.factors if a.labels is not None]
        reason = next((reasons[int(c[0])] for c in kept if int(c[0]) in reasons), "fixed")
        frozen.append((product.vector, reason))
    return True


def _reconciled(
    products: list[Product],
    component: NDArray[np.int64],
    still: NDArray[np.bool_],
    edges: list[tuple[Labels, Labels]],
    frozen: list[tuple[Labels, str]],
) -> list[Product]:
    """The products without repetitions; where two disagree about the same labels, the smallest factor is kept whole."""
    kept: list[Product] = []
    owner: dict[int, int] = {}
    seen: dict[tuple[bytes, tuple[int, ...]], Product] = {}
    for product in products:
        vector = component[product.vector]
        key = (vector.tobytes(), tuple(a.size for a in product.factors))
        if key in seen:
            other = seen[key]
            for a, b in zip(product.factors, other.factors, strict=True):
                if a.labels is not None and b.labels is not None:
                    edges.append((a.labels, b.labels))
                elif a.labels is not None or b.labels is not None:
                    frozen += [(x.labels, TWO_WAYS) for x in (a, b) if x.labels is not None]
            continue
        seen[key] = product
        _tie_repetitions(product, vector, component, edges)
        others = {owner[int(c)] for c in vector if int(c) in owner}
        if others:
            rivals = [product, *(kept[o] for o in others)]
            free = [a for p in rivals for a in p.factors if _free(a, component, still)]
            smallest = min(free, key=lambda a: a.size)
            assert smallest.labels is not None
            frozen.append((smallest.labels, TWO_WAYS))
        for c in vector:
            owner.setdefault(int(c), len(kept))
        kept.append(product)
    return kept


def _tie_repetitions(
    product: Product, vector: NDArray[np.int64], component: NDArray[np.int64], edges: list[tuple[Labels, Labels]]
) -> None:
    """Positions of one label go together, so their factors do, each with its own."""
    order = np.argsort(vector, kind="stable")
    same = vector[order][1:] == vector[order][:-1]
    if not same.any():
        return
    first, second = order[:-1][same], order[1:][same]
    for atom, where in zip(product.factors, _index(product), strict=True):
        if atom.labels is not None:
            a, b = atom.labels[where[first]], atom.labels[where[second]]
            differ = component[a] != component[b]
            if differ.any():
                edges.append((a[differ], b[differ]))


def _primes(products: list[Product], component: NDArray[np.int64]) -> dict[int, tuple[int, ...]]:
    direct: dict[int, set[int]] = {}
    for product in products:
        index = _index(product)
        columns = [component[a.labels[i]] for a, i in zip(product.factors, index, strict=True) if a.labels is not None]
        for row in zip(component[product.vector], *columns, strict=True):
            direct.setdefault(int(row[0]), set()).update(int(c) for c in row[1:])

    done: dict[int, tuple[int, ...]] = {}

    def expand(c: int) -> tuple[int, ...]:
        if c not in direct:
            return (c,)
        if c not in done:
            done[c] = (c,)  # a product that contains itself: its own prime
            done[c] = tuple(sorted({p for d in direct[c] for p in expand(d)}))
        return done[c]

    return {c: expand(c) for c in direct}
