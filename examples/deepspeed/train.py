"""A training run under DeepSpeed's own launcher.

python examples/data/emoji.py data/emoji
deepspeed --num_gpus 2 examples/deepspeed/train.py --config examples/demo.yaml \
    --deepspeed_config examples/deepspeed/ds.json train.steps=20
"""

import argparse
import sys

from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.run import train

parser = argparse.ArgumentParser()
parser.add_argument("--config", required=True, help="the run, as for gradcache-clip train")
parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed's JSON, used as it is")
parser.add_argument("--local_rank", type=int, help="of DeepSpeed's launcher")
parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
options = parser.parse_args()

strategy = [
    "distributed.strategy=deepspeed",
    f"distributed.deepspeed_config={options.deepspeed_config}",
]
summary = train(load_config(options.config, [*strategy, *options.overrides]))
sys.exit(0 if summary.finished else 130)
