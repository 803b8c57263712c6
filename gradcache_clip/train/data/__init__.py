"""Image-caption pairs out of webdataset shards: safe, deterministic, exactly resumable."""

from gradcache_clip.train.data.captions import read_captions
from gradcache_clip.train.data.loader import Batch, ImageCaptionLoader, join_states, read_all
from gradcache_clip.train.data.stream import DecodedSample, LoaderOptions

__all__ = [
    "Batch",
    "DecodedSample",
    "ImageCaptionLoader",
    "LoaderOptions",
    "join_states",
    "read_all",
    "read_captions",
]
