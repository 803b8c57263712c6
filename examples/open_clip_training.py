"""A model of open_clip, trained on batches of 256 in the memory of 32.

python examples/data/glyphs.py data/glyphs && python examples/open_clip_training.py data/glyphs
"""

import math
import sys
from pathlib import Path

import open_clip
import torch

from gradcache_clip import GradCache
from gradcache_clip.integrations.open_clip import ClipLoss, OpenClipTowers
from gradcache_clip.train.data import ImageCaptionLoader

folder = sys.argv[1] if len(sys.argv) > 1 else "data/glyphs"
if not Path(folder).is_dir():
    sys.exit(f"{folder} is missing: run python examples/data/glyphs.py {folder}")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40

torch.manual_seed(0)
model = open_clip.create_model(
    "ViT-B-32",
    embed_dim=64,
    vision_cfg={"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    text_cfg={"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
)
tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=24)

towers = OpenClipTowers(model)
cache = GradCache(towers, towers.loss_with(ClipLoss()), chunk_size=32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=5)

loader = ImageCaptionLoader(f"{folder}/train", batch_size=256)
for step, batch in zip(range(steps), loader, strict=False):
    optimizer.zero_grad()
    images = (batch.images / 255 - 0.93) / 0.24  # the pages are white
    out = cache(images, tokenizer(batch.captions))  # forward and backward
    optimizer.step()
    warm_up.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    print(f"step {step}  loss {out.loss:.3f}  in-batch accuracy {out.accuracy:.1%}", flush=True)
