"""Import images and captions as shards: from folders, tables, COCO, or code of your own."""

from gradcache_clip.train.sources.coco import CocoSplits, make_coco
from gradcache_clip.train.sources.folder import make_folder
from gradcache_clip.train.sources.shards import (
    Manifest,
    Sample,
    file_digest,
    read_manifest,
    verify_manifest,
    write_shards,
)
from gradcache_clip.train.sources.splits import (
    DataSummary,
    Recipe,
    SkippedSample,
    finished_output,
    track,
    write_splits,
)
from gradcache_clip.train.sources.table import TableColumns, make_table

__all__ = [
    "CocoSplits",
    "DataSummary",
    "Manifest",
    "Recipe",
    "Sample",
    "SkippedSample",
    "TableColumns",
    "file_digest",
    "finished_output",
    "make_coco",
    "make_folder",
    "make_table",
    "read_manifest",
    "track",
    "verify_manifest",
    "write_shards",
    "write_splits",
]
