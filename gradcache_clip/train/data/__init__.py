"""Image-caption pairs and texts: safe, shuffled by seed and step, exactly resumable."""

from gradcache_clip.train.data.batch import Batch
from gradcache_clip.train.data.loader import ImageCaptionLoader, Loader, join_states
from gradcache_clip.train.data.reading import read_all, read_captions
from gradcache_clip.train.data.samples import DecodedSample, LoaderOptions
from gradcache_clip.train.data.text_loader import TextBatch, TextLoader
from gradcache_clip.train.data.text_rows import TextRows, read_all_texts
from gradcache_clip.train.data.text_tables import find_text_files

__all__ = [
    "Batch",
    "DecodedSample",
    "ImageCaptionLoader",
    "Loader",
    "LoaderOptions",
    "TextBatch",
    "TextLoader",
    "TextRows",
    "find_text_files",
    "join_states",
    "read_all",
    "read_all_texts",
    "read_captions",
]
