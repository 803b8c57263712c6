"""The section `data` of a configuration: where samples come from and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradcache_clip.train.config_checks import at_least, check, in_range, not_empty

SMALLEST_VOCABULARY = 259
"""256 bytes and three special tokens, which every learned tokenizer has."""


@dataclass
class DataConfig:
    """Where samples come from and how they are read."""

    train: str = "data/train"
    """Folder of shards, glob or brace pattern (`shards/{000..099}.tar`) to train on; with
    `text_fields` a .jsonl file, a folder of them or a glob."""

    validation: str = ""
    """The same for held-out samples; empty: no evaluation while training."""

    image_size: int = 64
    """Height and width in pixels that images are resized and cropped to."""

    random_crop: float = 1.0
    """Smallest share of the image's area that a random crop keeps; 1 crops at the centre."""

    views: int = 1
    """2: two random views of each image instead of an image and its caption; see `augment`."""

    text_fields: list[str] = field(default_factory=list)
    """With any, the data are .jsonl files of texts instead of images: names of the fields of a line
    that hold a query, its document and hard negatives, such as [anchor, positive, negative]."""

    text_prompts: list[str] = field(default_factory=list)
    """What stands before each query, and before each document and hard negative, such as
    ["query: ", "passage: "]; empty: nothing."""

    context_length: int = 32
    """Longest caption or text in tokens, start and end included; longer ones are cut."""

    workers: int = 0
    """Processes that read and decode for each training process; 0: the training process does."""

    shuffle_buffer: int = 5000
    """Undecoded samples held in memory, from which the next is drawn at random."""

    max_broken_share: float = 0.05
    """Share of samples that may be unreadable before the run stops."""

    allow_url_schemes: list[str] = field(default_factory=list)
    """Schemes besides local files, such as `https`; `pipe` runs commands and is off."""

    tokenizer: str = "train"
    """`train` learns one from the training texts; else a tokenizer.json or a hub name."""

    vocab_size: int = 8192
    """Largest vocabulary of a learned tokenizer; 256 bytes and 3 special tokens are in each."""

    def __post_init__(self) -> None:
        not_empty("data", self, "train", "tokenizer")
        at_least(1, "data", self, "image_size", "shuffle_buffer")
        at_least(3, "data", self, "context_length")
        at_least(SMALLEST_VOCABULARY, "data", self, "vocab_size")
        at_least(0, "data", self, "workers")
        check(self.views in (1, 2), "data", self, "views", "1 or 2")
        fields = self.text_fields
        several = not fields or (len(fields) > 1 and len(set(fields)) == len(fields))
        check(several and all(fields), "data", self, "text_fields", "two or more different names")
        expected = "none, or one for queries and one for documents with data.text_fields"
        paired = not self.text_prompts or (len(self.text_prompts) == 2 and bool(fields))
        check(paired, "data", self, "text_prompts", expected)
        in_range("[0, 1]", "data", self, "max_broken_share")
        in_range("(0, 1]", "data", self, "random_crop")
