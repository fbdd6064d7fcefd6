"""What share of real networks can be pruned: `inspect` over the networks of coverage_networks.txt, with random weights.

    python benchmarks/coverage.py                      all networks; goes on where it was stopped
    python benchmarks/coverage.py --peer --limit 120   the same by Torch-Pruning (pip install torch-pruning), in 10 GiB at most
    python benchmarks/coverage.py timm:vit_tiny_patch16_224 own:yolo-C2f-list

Each network runs in a process of its own with a time limit. Lines are appended to build/coverage.jsonl; what is there is not made
again unless --again asks for it. --assemble without that file adds the peer's lines to the results there are. At the end
benchmarks/results/coverage.json holds
{"commit" (null where rows are of several), "missing": names, "networks": [inspection or {"model", "error"}, with the commit of
the code that made it]}.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent
LIST, RESULTS, LINES = HERE / "coverage_networks.txt", HERE / "results/coverage.json", HERE.parent / "build/coverage.jsonl"
PEER_LINES, PEER_LEFT = LINES.with_name("coverage-peer.jsonl"), 0.6  # half of all channels leaves a quarter to a half
PEER_BYTES = 10 * 2**30  # of address space: on windowed attention it asks for more than the machine has
LATE = ("128gf", "vit_h", "vit_l", "32gf", "16gf", "_b7", "_b6", "convnext_large", "v2_l", "101_64x4d", "senet154")


def networks() -> dict[str, tuple[int, ...]]:
    """Name -> shape of one input, the largest networks last."""
    lines = [line.split("\t") for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    found = {name: tuple(ast.literal_eval(shape)) for name, shape in lines}
    return dict(sorted(found.items(), key=lambda item: any(part in item[0] for part in LATE)))


def build(name: str) -> nn.Module:
    """A network of the list with random weights."""
    kind, _, model = name.partition(":")
    if kind == "torchvision":
        import torchvision

        return torchvision.models.get_model(model, weights=None)  # type: ignore[no-any-return]
    if kind == "timm":
        import timm

        return timm.create_model(model, pretrained=False)  # type: ignore[no-any-return]
    import coverage_models

    generators: dict[str, Callable[[], Iterator[tuple[str, Callable[[], nn.Module]]]]] = coverage_models.GENERATORS
    return next(factory() for found, factory in generators[kind]() if found == name)


def one(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The line of one network."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    from edge_compress.pipeline.axes.inspect import inspect
    from edge_compress.pipeline.errors import EdgeCompressError

    try:
        module, example = build(name), torch.rand(1, *shape) * 999 if "bert" in name else torch.randn(1, *shape)
        line = inspect(module, example, name=name).to_json()
    except EdgeCompressError as error:
        line = {"model": name, "error": str(error)}
    except Exception as error:  # a bug: listed like a refusal, with its type
        line = {"model": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    line["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return line


def peer(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """What Torch-Pruning makes of the same network when half of the channels of every group are to go.

    Its graph is built by a backward pass, so the example is of floats; the layers that give the network's classes stay, as its
    own examples do. `macs_left` is the share of the multiply-accumulates of the network that then runs.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    resource.setrlimit(resource.RLIMIT_AS, (PEER_BYTES, PEER_BYTES))
    line: dict[str, Any] = {"model": name}
    try:
        import torch_pruning as tp
        from torch.utils.flop_counter import FlopCounterMode

        module, example = build(name).eval(), torch.rand(1, *shape) * 999 if "bert" in name else torch.randn(1, *shape)

        def flops() -> int:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(example)
            return int(counter.get_total_flops())

        whole = flops()
        ends = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features in (10, 1000, 21841)]
        pruner = tp.pruner.MagnitudePruner(
            module, example, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=ends, round_to=None
        )
        pruner.step()
        line["macs_left"] = flops() / whole
    except Exception as error:  # what the peer raises is the finding
        line["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    return line


def in_child(
    name: str, shape: tuple[int, ...], limit_s: int, work: Callable[[str, tuple[int, ...]], dict[str, Any]]
) -> tuple[int, int, float]:
    """Start one network in a child process: (pid, file descriptor of its answer, deadline)."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        signal.alarm(limit_s)
        with os.fdopen(write, "w") as answer:
            json.dump(work(name, shape), answer)
        os._exit(0)
    os.close(write)
    return pid, read, time.monotonic() + limit_s


def collect(pid: int, read: int, name: str, limit_s: int) -> dict[str, Any]:
    """The answer of a child, or what became of it."""
    with os.fdopen(read) as answer:
        text = answer.read()
    status = os.waitpid(pid, 0)[1]
    if text:
        return json.loads(text)  # type: ignore[no-any-return]
    what = (
        f"not finished in {limit_s} s" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else f"status {status}"
    )
    return {"model": name, "error": what}


def commit() -> str:
    """The commit of this checkout."""
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def summary(lines: list[dict[str, Any]]) -> str:
    """One line: how many networks, and how many can be pruned."""
    good = [x for x in lines if x.get("prunable_macs_share", 0) >= 0.8 and x["equivalence"]["passed"]]
    told = f"{len(good)} of {len(lines)} networks: at least 80 % of the multiply-accumulates can be pruned, and cut is zeroed"
    tried = [x["torch_pruning"] for x in lines if "torch_pruning" in x]
    ran = [x for x in tried if x.get("macs_left", 1.0) <= PEER_LEFT]
    return f"{told}; Torch-Pruning: {len(ran)} of {len(tried)} run with at most {PEER_LEFT:.0%} left"


def main() -> None:
    """Run what is missing, then assemble the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--again", action="store_true", help="also what is already there")
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning instead of this project")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one network")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--assemble", action="store_true", help="run nothing, write the results of what is there")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    import timm  # noqa: F401  imported once, before the processes fork
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    every = networks()
    LINES.parent.mkdir(exist_ok=True)
    done = {}
    work, written = (peer, PEER_LINES) if args.peer else (one, LINES)
    if written.exists():
        done = {x["model"]: x for x in map(json.loads, written.read_text().splitlines())}
    queue = [n for n in (args.names or every) if args.again or args.names or n not in done]
    queue = [] if args.assemble else queue
    running: dict[str, tuple[int, int, float]] = {}
    while queue or running:
        while queue and len(running) < args.workers:
            name = queue.pop(0)
            running[name] = in_child(name, every[name], args.limit, work)
        for name, (pid, read, _) in list(running.items()):
            import select

            if not select.select([read], [], [], 0.2)[0]:
                continue
            line = collect(pid, read, name, args.limit) | {"commit": commit()}
            del running[name]
            done[name] = line
            with written.open("a") as file:
                file.write(json.dumps(line) + "\n")
            share = line.get("prunable_macs_share")
            figure = line.get("error", f"{share:.3f} {line.get('equivalence')}" if share is not None else "")
            print(
                f"{name}\t{figure}\t{line.get('seconds', 0):.1f} s\t{line.get('peak_gib', '')} GiB",
                flush=True,
            )
    if args.peer:
        return
    if args.assemble and not done:
        done = {x["model"]: x for x in json.loads(RESULTS.read_text())["networks"]}
    peers = {x["model"]: x for x in map(json.loads, PEER_LINES.read_text().splitlines())} if PEER_LINES.exists() else {}
    lines = [done[n] | ({"torch_pruning": peers[n]} if n in peers else {}) for n in every if n in done]
    missing = [n for n in every if n not in done]
    made_by = {x.get("commit") for x in lines}
    head = json.dumps({"commit": made_by.pop() if len(made_by) == 1 else None, "missing": missing})
    RESULTS.write_text(f'{head[:-1]},\n"networks": [\n' + ",\n".join(map(json.dumps, lines)) + "\n]}\n")
    print(summary(lines))


if __name__ == "__main__":
    main()
