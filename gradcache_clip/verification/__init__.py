"""Is the cached step exact for a person's own encoders? Both steps on one batch, and why not."""

from gradcache_clip.verification.compare import verify
from gradcache_clip.verification.report import VerifyReport, VerifyRow

__all__ = ["VerifyReport", "VerifyRow", "verify"]
