"""Trains the compact transformer on CIFAR-10 with a ResNet as its teacher; a run that was stopped goes on where it was.

python benchmarks/vit_cifar.py --data cifar.npz --teacher resnet_cifar.py:resnet56 --teacher-weights resnet56.pt --epochs 30 \
        --work build/vit --out benchmarks/models/compact-transformer-cifar10.safetensors
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from compact_transformer import MEAN, STD, compact_transformer
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.task.models import load_model
from safetensors.torch import load_file, save
from torch import nn

BATCH = 128
PEAK_RATE, DECAY, TEMPERATURE, FROM_TEACHER = 2e-3, 0.05, 2.0, 0.7


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is orthogonalised by Newton-Schulz (Jordan et al. 2024), in float32.

    Steps have the root mean square of Adam's (Liu et al. 2025, arXiv 2502.16982). `torch.optim.Muon` does the same for matrices
    (`adjust_lr_fn="match_rms_adamw"`), but in bfloat16, which processors without bfloat16 units emulate.
    """

    def __init__(self, matrices: list[nn.Parameter], rate: float, decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": rate, "weight_decay": decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix; convolutions are matrices of (outputs, inputs x positions)."""
        for group in self.param_groups:
            for weight in group["params"]:
                assert weight.grad is not None
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalised(weight.grad.lerp(momentum, group["momentum"]).flatten(1))
                scale = 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(weight), alpha=-group["lr"] * scale)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic Newton-Schulz iteration: all singular values near 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).contiguous()


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Network inputs (n, 3, 32, 32) of uint8 pixels (n, 32, 32, 3)."""
    x = pixels.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def teachings(teacher: nn.Module, pixels: torch.Tensor, path: Path) -> torch.Tensor:
    """The teacher's logits (2, n, 10) of all images as they are and mirrored, from the file if it is there."""
    if path.exists():
        return load_file(path)["logits"]
    with torch.inference_mode():
        found = torch.stack(
            [
                torch.cat([teacher(normalised(part.flip(2) if mirrored else part)) for part in torch.split(pixels, 500)])
                for mirrored in (False, True)
            ]
        )
    atomic_write(path, save({"logits": found.clone()}))
    return found.clone()


def varied(pixels: torch.Tensor, mirrored: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Inputs cropped from the image with a border of 4 pixels, mirrored where said."""
    x = normalised(pixels)
    x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    padded = F.pad(x, (4, 4, 4, 4))
    rows, columns = (torch.randint(0, 9, (len(x),), generator=generator) for _ in range(2))
    at = torch.arange(32)
    n, down, across = torch.arange(len(x)).view(-1, 1, 1), (rows[:, None] + at)[:, :, None], (columns[:, None] + at)[:, None, :]
    return padded.permute(0, 2, 3, 1)[n, down, across].permute(0, 3, 1, 2)


def hidden(net: nn.Module) -> list[nn.Parameter]:
    """The matrices between the layers, for Muon: all but embeddings, the first layer and the two heads."""
    return [p for name, p in net.named_parameters() if p.ndim > 1 and (name.startswith("encoders.") or name == "conv2.weight")]


def others(net: nn.Module) -> list[nn.Parameter]:
    """What is not `hidden`."""
    inside = {id(p) for p in hidden(net)}
    return [p for p in net.parameters() if id(p) not in inside]


def top1(net: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent right."""
    net.eval()
    with torch.inference_mode():
        found = torch.cat([net(normalised(part)).argmax(1) for part in torch.split(pixels, 500)])
    return 100 * float((found == labels).float().mean())


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--teacher", required=True)
@click.option("--teacher-weights", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--epochs", default=30, show_default=True)
@click.option("--held-out", default=5000, show_default=True, help="Training images kept aside to judge by, from the end.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Checkpoints and the teacher's logits.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, teacher: str, teacher_weights: Path, epochs: int, held_out: int, work: Path, out: Path) -> None:
    """Train, and write weights and a log beside them."""
    work.mkdir(parents=True, exist_ok=True)
    with np.load(data) as archive:
        pixels, test = (torch.from_numpy(archive[f"{split}_images"]) for split in ("train", "test"))
        labels, test_labels = (torch.from_numpy(archive[f"{split}_labels"].astype(np.int64)) for split in ("train", "test"))
    teaching = load_model(teacher, teacher_weights, classes=10, image_shape=(3, 32, 32)).module.eval()
    targets = teachings(teaching, pixels, work / "teacher.safetensors")
    count = len(pixels) - held_out
    net = compact_transformer()
    optimizers = [Muon(hidden(net), PEAK_RATE, DECAY), torch.optim.AdamW(others(net), lr=PEAK_RATE, weight_decay=0.0)]
    total_steps = epochs * -(-count // BATCH)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, PEAK_RATE, total_steps=total_steps, pct_start=0.15, cycle_momentum=False)
        for o in optimizers
    ]
    parts = [net, *optimizers, *schedules]
    checkpoint, log, begun = work / "checkpoint.pt", out.with_suffix(".log"), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for part, state in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(state)
        begun = saved["epochs"]
    out.parent.mkdir(parents=True, exist_ok=True)
    for epoch in range(begun, epochs):
        start, total = time.perf_counter(), 0.0
        generator = torch.Generator().manual_seed(epoch)
        torch.manual_seed(epoch)
        net.train()
        for some in torch.split(torch.randperm(count, generator=generator), BATCH):
            mirrored = torch.rand(len(some), generator=generator) < 0.5
            logits = net(varied(pixels[some], mirrored, generator))
            taught = targets[mirrored.long(), some]
            answers, wanted = ((x / TEMPERATURE).log_softmax(1) for x in (logits, taught))
            distance = F.kl_div(answers, wanted, log_target=True, reduction="batchmean")
            loss = FROM_TEACHER * TEMPERATURE**2 * distance + (1 - FROM_TEACHER) * F.cross_entropy(logits, labels[some])
            net.zero_grad()
            loss.backward()
            for each in (*optimizers, *schedules):
                each.step()
            total += float(loss.detach()) * len(some)
        judged = top1(net, pixels[count:], labels[count:])
        line = f"epoch {epoch + 1}: loss {total / count:.4f}, top-1 held out {judged:.2f}, {time.perf_counter() - start:.0f} s"
        click.echo(line)
        with log.open("a") as file:
            file.write(line + "\n")
        torch.save({"parts": [part.state_dict() for part in parts], "epochs": epoch + 1}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
    line = f"top-1 on the test split after {epochs} epochs: {top1(net, test, test_labels):.2f}"
    click.echo(line)
    with log.open("a") as file:
        file.write(line + "\n")
    atomic_write(out, save({k: v.contiguous() for k, v in net.state_dict().items()}))


if __name__ == "__main__":
    main()
