"""Time and memory of whole-model curvature beside plain gradients of the same images."""

from __future__ import annotations

import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from edge_compress.pipeline.axes.types import Unit
from edge_compress.pipeline.network.exact_mode import Batch
from edge_compress.pipeline.score.curvature import gauss_newton
from edge_compress.pipeline.score.removal import removal_curvature
from finite_differences import gradient_difference
from torch import Tensor, nn

Work = Callable[[nn.Module, Tensor], object]  # network, inputs (n, C, H, W)
BATCH = 100  # images in one forward pass, as in the product


def gradients(net: nn.Module, inputs: Tensor) -> None:
    """Forward and backward pass with the gradients of all parameters, batch after batch; eval mode."""
    parameters = list(net.parameters())
    for x in inputs.split(BATCH):
        logits = net(x)
        torch.autograd.grad(F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long)), parameters)


def training_step(net: nn.Module, inputs: Tensor) -> None:
    """The same with Adam's update of all parameters, in training mode."""
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6)
    for x in inputs.split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long)).backward()
        optimizer.step()


def batches(inputs: Tensor) -> list[Batch]:
    """Inputs as the estimators take them; the labels are not used."""
    return [(x, torch.zeros(len(x), dtype=torch.long)) for x in inputs.split(BATCH)]


def of_connections(net: nn.Module, inputs: Tensor) -> None:
    """The product's curvature of every connection."""
    gauss_newton(net, batches(inputs))


def of_units(units: Mapping[str, Sequence[Unit]], net: nn.Module, inputs: Tensor) -> None:
    """The product's curvature of every unit; to be used with `partial`."""
    removal_curvature(net, units, batches(inputs))


def of_differences(net: nn.Module, inputs: Tensor) -> None:
    """The Hessian's diagonal with one probe: twice the gradients."""
    gradient_difference(net, batches(inputs), 1)


def times(
    net: nn.Module, inputs: Tensor, works: Mapping[str, Work], rounds: int, tell: Callable[[], None]
) -> dict[str, list[float]]:
    """Processor seconds of each, `rounds` times, one after the other in every round.

    Processor time of this process, not the clock's: other work on the machine then counts only through shared caches.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work(net, inputs)
            if turn:  # the first round warms up
                found[name].append(time.process_time() - start)
        tell()
    return found


def ratio(found: Mapping[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """Median over rounds of name/to, and the quartiles."""
    ratios = [a / b for a, b in zip(found[name], found[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return middle, low, high


def memory(net: nn.Module, inputs: Tensor, works: Mapping[str, Work]) -> dict[str, dict[str, float]]:
    """Peak memory of each in a fresh process: in all, and over what the process had with network and images loaded; MiB."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for name, work in works.items():
        answers: multiprocessing.Queue[tuple[float, float]] = context.Queue()
        process = context.Process(target=_peak, args=(work, net, inputs, answers))
        process.start()
        before, peak = answers.get(timeout=3600)
        process.join()
        found[name] = {"peak_mib": peak, "increase_mib": peak - before}
    return found


def _peak(work: Work, net: nn.Module, inputs: Tensor, answers: multiprocessing.Queue[tuple[float, float]]) -> None:
    torch.set_num_threads(1)
    work(net, inputs[:2])  # code and constants that are loaded at the first call
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM back to what is held now
    before = _status("VmRSS")
    work(net, inputs)
    answers.put((before, _status("VmHWM")))


def _status(key: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status without {key}")
    return int(match[1]) / 1024
