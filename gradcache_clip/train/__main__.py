"""`python -m gradcache_clip.train CONFIG.yaml section.key=value ...`, for launchers."""

from __future__ import annotations

import argparse

from gradcache_clip.train.command import add_train_arguments, end, run_command
from gradcache_clip.train.launch import end_with_launcher

NAME = "python -m gradcache_clip.train"

if __name__ == "__main__":
    end_with_launcher()
    parser = argparse.ArgumentParser(prog=NAME, description="Train a CLIP model from shards.")
    add_train_arguments(parser)
    end(run_command(parser.parse_args(), name=NAME))
