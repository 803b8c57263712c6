"""Our losses in place of sentence-transformers', as a plugin of pytest for the library's own tests:

PYTHONPATH=tests python -m pytest -p sentence_transformers_swapped FILES_OF_THE_LIBRARY

Models of the hub that its tests ask for are replaced by a small BERT with random weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_sentences import tiny_tokenizer
from transformers import BertConfig, BertModel

from gradcache_clip.integrations import sentence_transformers as ours

HUB = (
    "sentence-transformers-testing/stsb-bert-tiny-safetensors",
    "distilbert/distilbert-base-uncased",
)
LOSSES = {
    "CachedMultipleNegativesRankingLoss": ours.CachedMultipleNegativesRankingLoss,
    "CachedGISTEmbedLoss": ours.CachedGISTEmbedLoss,
    "MarginMSELoss": ours.CachedMarginMSELoss,
    "DistillKLDivLoss": ours.CachedDistillKLDivLoss,
}


def pytest_configure() -> None:
    folder = Path(tempfile.mkdtemp())
    _stand_in(folder)
    _use(str(folder / "model"))
    for name, loss in LOSSES.items():
        usual = getattr(losses, name)
        setattr(sys.modules[usual.__module__], name, loss)
        setattr(losses, name, loss if name.startswith("Cached") else _for_any_model(loss))


def _stand_in(folder: Path) -> None:
    """Write a BERT with random weights and its tokenizer."""
    tokenizer = tiny_tokenizer(folder / "bert")
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 512, "max_position_embeddings": 512}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    pooling = Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling]).save(str(folder / "model"))


def _use(path: str) -> None:
    usual = SentenceTransformer.__init__

    def __init__(self: Any, name: Any = None, *arguments: Any, **more: Any) -> None:
        usual(self, path if name in HUB else name, *arguments, **more)

    SentenceTransformer.__init__ = __init__


def _for_any_model(loss: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Some of its tests build a loss of embeddings without a model."""

    class ForAnyModel(loss):
        def __init__(self, model: Any = None, *arguments: Any, **more: Any) -> None:
            model = torch.nn.Identity() if model is None else model
            super().__init__(model, *arguments, **more)

    return ForAnyModel
