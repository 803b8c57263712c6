"""Makers of shards of images and captions, and of triplets of texts."""

from gradcache_clip.train.sources.coco import CocoSplits, make_coco
from gradcache_clip.train.sources.emoji import make_emoji
from gradcache_clip.train.sources.folder import make_folder
from gradcache_clip.train.sources.glyphs import make_glyphs
from gradcache_clip.train.sources.shards import (
    Manifest,
    Sample,
    read_manifest,
    verify_manifest,
    write_shards,
)
from gradcache_clip.train.sources.splits import DataSummary
from gradcache_clip.train.sources.table import TableColumns, make_table
from gradcache_clip.train.sources.wordnet import TripletSummary, make_wordnet

__all__ = [
    "CocoSplits",
    "DataSummary",
    "Manifest",
    "Sample",
    "TableColumns",
    "TripletSummary",
    "make_coco",
    "make_emoji",
    "make_folder",
    "make_glyphs",
    "make_table",
    "make_wordnet",
    "read_manifest",
    "verify_manifest",
    "write_shards",
]
