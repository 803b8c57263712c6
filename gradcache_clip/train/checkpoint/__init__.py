"""Checkpoints that survive a kill, a full disk and a flipped bit."""

from gradcache_clip.train.checkpoint.files import (
    CheckpointError,
    DamagedCheckpointError,
)
from gradcache_clip.train.checkpoint.folders import (
    Checkpoint,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from gradcache_clip.train.checkpoint.rng import capture_rng, restore_rng, seed_rng

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DamagedCheckpointError",
    "capture_rng",
    "load_checkpoint",
    "load_latest",
    "restore_rng",
    "save_checkpoint",
    "seed_rng",
]
