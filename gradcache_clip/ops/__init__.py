"""Loss ops: one public function each, several implementations behind it."""

from gradcache_clip.ops.clip import ClipLossResult, Impl, clip_loss, clip_loss_with_accuracy

__all__ = ["ClipLossResult", "Impl", "clip_loss", "clip_loss_with_accuracy"]
