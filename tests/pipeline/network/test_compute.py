"""Compute: what a machine offers a run, and that every room that computes does so where it is told to."""

from __future__ import annotations

import os
from pathlib import Path

import nets
import pytest
import torch
from edge_compress.pipeline.evaluate.reward_samples import RewardSamples
from edge_compress.pipeline.finetune.training import FinetuneSettings
from edge_compress.pipeline.network.compute import Compute, free_bytes, threads_to_use, total_bytes, usable_cpus
from edge_compress.pipeline.reconstruct.gptq import round_weights
from edge_compress.pipeline.reconstruct.optimal_brain_surgeon import chosen_masks
from edge_compress.pipeline.reconstruct.sequential import sequential, sequential_masked
from edge_compress.pipeline.score.connections import ConnectionScores
from edge_compress.pipeline.score.layer_moments import LayerMoments
from edge_compress.pipeline.score.ranking import UnitScores
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import Batch
from torch import nn

GIB = 1 << 30


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_a_container_with_two_processors_does_not_start_a_thread_for_each_of_its_host(tmp_path, monkeypatch, files, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert usable_cpus(machine(tmp_path, files)) == cpus


def test_the_affinity_and_the_users_own_thread_count_are_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cpus(tmp_path) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_to_use() == 2


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 10 * GIB),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 10 * GIB),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            },
            2 * GIB,
        ),
    ],
)
def test_free_memory_is_what_the_control_group_leaves(tmp_path, files, free):
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {10 * GIB >> 10} kB\n", **files}
    assert free_bytes(machine(tmp_path, files)) == free


def test_the_memory_for_training_is_the_machines_or_its_control_groups_whatever_is_free(tmp_path):
    files = {"proc/meminfo": f"MemTotal: {16 * GIB >> 10} kB\nMemAvailable: {GIB >> 10} kB\n"}
    assert total_bytes(machine(tmp_path / "machine", files)) == 16 * GIB
    limited = {**files, "proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": f"{6 * GIB}\n"}
    assert total_bytes(machine(tmp_path / "container", limited)) == 6 * GIB
    unlimited = {**limited, "sys/fs/cgroup/job/memory.max": "max\n"}
    assert total_bytes(machine(tmp_path / "unlimited", unlimited)) == 16 * GIB


def everything(compute: Compute, folder: Path) -> dict[str, object]:
    """What each room computes of a small network, by name; each is a call."""
    net, coupling = nets.subject("OptionA")
    inputs, names = nets.images(12), ["layer1.0.conv1", "layer2.0.conv2"]
    masks = {n: net.get_parameter(f"{n}.weight").detach().abs() > 0.05 for n in names}
    images = RewardSamples(Batch(inputs, torch.zeros(12)), inputs, Classification(), net, compute)

    def restored() -> list[torch.Tensor]:
        return [value for moments in images.dense_moments(net).values() for value in moments]

    def values(module: nn.Module) -> list[torch.Tensor]:
        return [v for v in module.state_dict().values() if v.is_floating_point()]

    return {
        "unit scores": lambda: list(UnitScores(net, nets.units(coupling), inputs, "hasa", 0, compute).at(0.5).values()),
        "published scores": lambda: list(UnitScores(net, nets.units(coupling), inputs, "published", 0, compute).at(0.5).values()),
        "connection scores": lambda: list(ConnectionScores(net, lambda: inputs, "hasa", 0, compute).at(0.5).values()),
        "Hessians": lambda: list(LayerMoments(net, inputs, compute, folder=folder).gram.values()),
        "BatchNorm": restored,
        "reconstruction": lambda: values(sequential(coupling, {}, {}, inputs, compute=compute)),
        "masked reconstruction": lambda: values(sequential_masked(net, masks, inputs, compute=compute)),
        "OBS": lambda: list(chosen_masks(net, masks, inputs, compute=compute).values()),
        "GPTQ": lambda: values(round_weights(net, [inputs.numpy()], compute=compute)),
    }


ROOMS = tuple(everything(Compute(), Path()))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_that_ignores_the_device_it_is_given_is_found(room, tmp_path, monkeypatch):
    """Moving to the device is made to fail: a room that never tries has computed on the processor all the same."""

    class Reached(Exception):
        pass

    def moved(*args: object, **more: object) -> None:
        raise Reached

    call = everything(Compute("meta"), tmp_path)[room]
    monkeypatch.setattr(nn.Module, "to", moved)
    with pytest.raises(Reached):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("room", ROOMS)
def test_a_gpu_computes_what_the_processor_does(room, tmp_path):
    here, there = (everything(Compute(device), tmp_path / device)[room]() for device in ("cpu", "cuda"))
    for expected, found in zip(here, there, strict=True):
        if expected.dtype == torch.bool:
            assert float((expected == found.cpu()).float().mean()) > 0.98
        else:
            torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_a_training_has_one_key_whatever_the_device_and_its_autocast():
    """A GPU trains under bfloat16, most processors do not: what one has begun the other goes on with."""
    assert FinetuneSettings(3, 0, device="cuda", autocast=True).recipe() == FinetuneSettings(3, 0).recipe()
