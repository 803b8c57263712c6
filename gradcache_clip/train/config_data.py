"""The section `data` of each program."""

from __future__ import annotations

from pydantic import Field, field_validator

from gradcache_clip.train.config import DataConfig
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_section import Section, changeable

SMALLEST_VOCABULARY = 259
"""256 bytes and three special tokens, which every learned tokenizer has."""


class ImageData(DataConfig):
    """Webdataset shards of images."""

    image_size: int = Field(64, ge=1, le=2**14)
    """Height and width in pixels that images are resized and cropped to."""

    random_crop: float = Field(1.0, gt=0, le=1)
    """Smallest share of the image's area that a random crop keeps; 1 crops at the centre."""

    shuffle_buffer: int = Field(5000, ge=1, le=2**31)
    """For streamed shards (URLs, .tar.gz): undecoded samples held in memory, from which the next is
    drawn at random. Local shards are shuffled as a whole."""

    allow_url_schemes: list[str] = changeable([])
    """Schemes besides local files, such as `https`; `pipe` runs commands. Given on the command line
    alone: a file cannot allow itself what it may open."""


class TokenizedData(Section):
    """Texts as tokens."""

    context_length: int = Field(32, ge=3, le=2**20)
    """Longest caption or text in tokens, start and end included; longer ones are cut."""

    tokenizer: str = Field("train", min_length=1)
    """`train` learns one from the training texts; else a tokenizer.json or a hub name."""

    vocab_size: int = Field(8192, ge=SMALLEST_VOCABULARY, le=2**24)
    """Largest vocabulary of a learned tokenizer; 256 bytes and 3 special tokens are in each."""


class PairData(ImageData, TokenizedData):
    """Webdataset shards of images and captions."""


class TextData(DataConfig, TokenizedData):
    """Rows of texts: .jsonl, .parquet, .csv or .arrow files, a folder of them or a glob."""

    text_fields: list[str] = Field(["anchor", "positive"])
    """Names of the fields of a row that hold a query, its document and hard negatives, such as
    [anchor, positive, negative]."""

    text_prompts: list[str] = Field([])
    """Prefixes of each query, and of each document and hard negative, such as ["query: ",
    "passage: "]; empty for none."""

    @field_validator("text_fields")
    @classmethod
    def _check_fields(cls, fields: list[str]) -> list[str]:
        if len(fields) < 2 or len(set(fields)) < len(fields) or not all(fields):
            raise ConfigError(
                f"data.text_fields: expected two or more different names, got {fields}; use e.g. "
                "data.text_fields=[anchor,positive]"
            )
        return fields

    @field_validator("text_prompts")
    @classmethod
    def _check_prompts(cls, prompts: list[str]) -> list[str]:
        if len(prompts) not in (0, 2):
            raise ConfigError(
                f"data.text_prompts: expected none, or one for queries and one for documents, got "
                f"{prompts}; use e.g. ['query: ', 'passage: ']"
            )
        return prompts
