"""Several processes that work as one: each takes a share of the images, and all end with the same bits.

`torchrun` starts them and says in the environment who they are (RANK, WORLD_SIZE, LOCAL_RANK) and where they meet (MASTER_ADDR,
MASTER_PORT). They talk through gloo on the CPU and nccl on CUDA. A process that was started without it is a `World` of one.

Every method but `share` is called by all ranks, in the same order: a rank that is alone there waits for the others.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from edge_compress.pipeline.errors import BuildError, InputError, UnavailableError
from edge_compress.pipeline.finetune.world import World
from edge_compress.pipeline.network.weights import digest_of
from edge_compress.pipeline.score.connections import ConnectionScores
from edge_compress.pipeline.score.curvature import gauss_newton
from edge_compress.pipeline.score.ranking import CURVATURE_IMAGES
from edge_compress.pipeline.task.samples import batches
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT_S = 1800  # a rank waits so long for another one, which may be reading a large data set


class Ranks(World):
    """This process among several; "cuda" is the current CUDA device, which `opened` has set."""

    def share(self, count: int, least: int = 1) -> range:
        """The positions of 0..count-1 that this rank works on: one stretch, the ranks' in order, of nearly one size.

        Raises:
            InputError: a rank would have fewer than `least`.
        """
        if count < self.size * least:
            found, expected = f"{count} images", f"at least {least} for each of {self.size} processes"
            raise InputError(
                "images to share out", found=found, expected=expected, do="start fewer processes or take more images at once"
            )
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def mean(self, tensors: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
        """Means over all images from the ranks' means, the same bits on every rank; summed in float64.

        Args:
            tensors: name -> the mean over this rank's images, of one shape on all ranks.
            images: how many that were, at least 1.

        Returns:
            Name -> mean, of the argument's type and on its device.
        """
        count = torch.tensor(float(images), dtype=torch.float64, device=self.device)
        dist.all_reduce(count)
        found = {}
        for name, tensor in tensors.items():
            total = tensor.detach().to(self.device, torch.float64, copy=True).contiguous().mul_(images)
            dist.all_reduce(total)
            # How an all-reduce adds is the backend's business, even whether each rank adds in the same order.
            dist.broadcast(total, src=0)
            found[name] = (total / count).to(tensor)
        return found

    def mean_of(self, value: float, images: int) -> float:
        """`mean` of one number."""
        return self.mean({"": torch.tensor(value, dtype=torch.float64)}, images)[""].item()

    def agree(self, what: str, value: str | Mapping[str, Tensor]) -> None:
        """Go on only if the value is the same on every rank, bit for bit.

        Args:
            what: what the value is, for the message: "masks".
            value: a text, or tensors by name.

        Raises:
            BuildError: it is not; on every rank, with the ranks that differ from rank 0.
        """
        digest = hashlib.sha256((value if isinstance(value, str) else digest_of(value)).encode()).digest()
        own = torch.tensor(list(digest), dtype=torch.uint8, device=self.device)
        all_ = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(all_, own)
        others = [rank for rank, theirs in enumerate(all_) if not torch.equal(theirs, all_[0])]
        if others:
            named = ", ".join(map(str, others))
            found = f"rank{'s' if len(others) > 1 else ''} {named} unlike rank 0"
            do = "give all processes the same files, one shared output folder, and machines of one kind"
            raise BuildError(f"the processes differ in their {what}", found=found, expected="the same on all", do=do)

    def average_buffers(self, module: nn.Module) -> None:
        """BatchNorm's running statistics become the mean over all ranks, in place.

        They are linear in those of the batches, so the mean at the end of an epoch is what averaging after each step would give.
        """
        with torch.no_grad():
            buffers = {name: value for name, value in module.named_buffers() if value.is_floating_point()}
            for name, value in self.mean(buffers, 1).items():
                buffers[name].copy_(value)

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, in a wrapper that averages gradients over all ranks in the backward pass.

        BatchNorm normalises each rank's images by their own statistics, as in Goyal et al. 2017 (arXiv 1706.02677, section 2.3),
        where 32 images for each process train as well as one process does: synchronised layers would wait for all ranks twice
        in each, and exist on CUDA only. `average_buffers` makes the running statistics one before anything is read off them.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the argument's new name is unknown to the older releases we take
            return DistributedDataParallel(module, broadcast_buffers=False)


class SharedScores(ConnectionScores):
    """Scores of all connections; every rank takes the curvature of its share of the images, all get that over all of them."""

    def __init__(self, net: nn.Module, inputs: Tensor, score: str, seed: int, world: World) -> None:
        super().__init__(net, lambda: inputs, score, seed)
        self._world, self._images, self._of_signs = world, inputs[:CURVATURE_IMAGES], seed

    def curvature(self) -> dict[str, Tensor]:
        """Gauss-Newton diagonal over all ranks' images."""
        part = self._world.share(len(self._images))
        images = self._images[part.start : part.stop]
        return self._world.mean(gauss_newton(self.net, batches(images), seed=self._of_signs, skip=part.start), len(part))


@contextmanager
def opened(accelerator: str = "auto") -> Iterator[World]:
    """The world that `torchrun` started this process in; its process group is open inside. Without `torchrun` it is alone.

    Args:
        accelerator: "cpu", "cuda", or "auto": CUDA where it is.

    Raises:
        InputError: the environment says half of what is needed, or nonsense.
        UnavailableError: no CUDA device, or fewer than processes on this machine.
    """
    rank, size, local = _who()
    cuda = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    if cuda and local >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices for process {local + 1} of this machine"
        raise UnavailableError("--accelerator cuda", found=found, expected="one for each", do="lower --nproc-per-node")
    if cuda:
        torch.cuda.set_device(local)
    name = "cuda" if cuda else "cpu"
    if size == 1:
        yield World(device=name)
        return
    device = torch.device("cuda", local) if cuda else None
    try:
        # torchrun's store outlives a restart: without a prefix of their own the processes look for those of the attempt before
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=TIMEOUT_S))))
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        how = {"store": store, "rank": rank, "world_size": size, "timeout": timedelta(seconds=TIMEOUT_S), "device_id": device}
        dist.init_process_group("nccl" if cuda else "gloo", **how)
    except (RuntimeError, ValueError) as error:
        what, found = "the processes cannot meet", f"{type(error).__name__}: {error}"
        raise UnavailableError(what, found=found, do="start them with torchrun, and check MASTER_ADDR and MASTER_PORT") from error
    failed = True
    try:
        yield Ranks(rank, size, name)
        failed = False
    finally:
        # nccl's end waits for ranks that may never come; a process that fails is stopped, with the others, by torchrun
        if not (failed and cuda):
            dist.destroy_process_group()


def _who() -> tuple[int, int, int]:
    """Rank, number of ranks, and number among this machine's, from the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given:
        return 0, 1, 0
    expected = "RANK, WORLD_SIZE and LOCAL_RANK, whole numbers, RANK below WORLD_SIZE"
    try:
        rank, size, local = (int(given[name]) for name in names)
    except (KeyError, ValueError):
        rank, size, local = -1, 0, 0
    if not 0 <= rank < size or local < 0:
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError("the environment", found=found, expected=expected, do="start with torchrun, or unset them")
    return rank, size, local
