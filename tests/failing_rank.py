"""The training command with a fault in its second step on rank 1; torchrun starts it."""

from __future__ import annotations

import argparse
import os
import sys

from processes import fails_on_rank_1, inject

from gradcache_clip.train.command import add_train_arguments, run_command

if __name__ == "__main__":
    inject(int(os.environ["RANK"]), fails_on_rank_1)
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    sys.exit(run_command(parser.parse_args(), name="train"))
