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
from sentence_transformers.multi_vector_encoder import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder import losses as multi_vector_losses
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_sentences import tiny_tokenizer
from transformers import BertConfig, BertModel

from gradcache_clip.integrations import sentence_transformers as ours
from gradcache_clip.integrations import sentence_transformers_multi_vector as ours_multi_vector

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
_CACHED = "CachedMultiVectorMultipleNegativesRankingLoss"
MULTI_VECTOR_LOSSES = {
    _CACHED: getattr(ours_multi_vector, _CACHED),
    "MultiVectorMarginMSELoss": ours_multi_vector.CachedMultiVectorMarginMSELoss,
    "MultiVectorDistillKLDivLoss": ours_multi_vector.CachedMultiVectorDistillKLDivLoss,
}


def pytest_configure() -> None:
    folder = Path(tempfile.mkdtemp())
    _stand_in(folder)
    _use(SentenceTransformer, str(folder / "model"))
    _use(MultiVectorEncoder, str(folder / "bert"))
    for name, loss in LOSSES.items():
        usual = getattr(losses, name)
        setattr(sys.modules[usual.__module__], name, loss)
        setattr(losses, name, loss if name.startswith("Cached") else _for_any_model(loss))
    for name, loss in MULTI_VECTOR_LOSSES.items():
        setattr(multi_vector_losses, name, loss)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Models of its tests get their inputs by the name that they have in the library's."""
    for module in {item.module for item in items}:
        for kind in vars(module).values():
            if isinstance(kind, type) and "__call__" in vars(kind):
                kind.__call__ = _with_input(kind.__call__)


def _with_input(call: Any) -> Any:
    return lambda self, features=None, input=None, **more: call(self, features or input, **more)


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


def _use(kind: Any, path: str) -> None:
    usual = kind.__init__

    def __init__(self: Any, name: Any = None, *arguments: Any, **more: Any) -> None:
        usual(self, path if name in HUB else name, *arguments, **more)

    kind.__init__ = __init__


def _for_any_model(loss: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Some of its tests build a loss of embeddings without a model."""

    class ForAnyModel(loss):
        def __init__(self, model: Any = None, *arguments: Any, **more: Any) -> None:
            model = torch.nn.Identity() if model is None else model
            super().__init__(model, *arguments, **more)

    return ForAnyModel
