"""Makers of webdataset shards: emoji, glyphs, a folder or table of images, COCO captions."""

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

__all__ = [
    "CocoSplits",
    "DataSummary",
    "Manifest",
    "Sample",
    "TableColumns",
    "make_coco",
    "make_emoji",
    "make_folder",
    "make_glyphs",
    "make_table",
    "read_manifest",
    "verify_manifest",
    "write_shards",
]
