"""`python -m gradcache_clip.train CONFIG.yaml section.key=value ...`, for launchers."""

from __future__ import annotations

import sys

from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.loop import train

if __name__ == "__main__":
    summary = train(load_config(sys.argv[1] if len(sys.argv) > 1 else None, sys.argv[2:]))
    sys.exit(0 if summary.finished else 130)
