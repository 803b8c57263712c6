"""Gradient caching in your own training loop.

python examples/data/glyphs.py data/glyphs && python examples/minimal_loop.py data/glyphs/train
"""

import sys

import timm
import torch
from transformers import BertConfig, BertModel

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.train.data import ImageCaptionLoader, read_captions
from gradcache_clip.train.tokenizer import train_tokenizer

shards = sys.argv[1] if len(sys.argv) > 1 else "data/glyphs/train"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
tokenizer = train_tokenizer(read_captions(shards), vocab_size=2000)

image_encoder = timm.create_model(
    "vit_tiny_patch16_224", img_size=64, embed_dim=128, depth=4, num_heads=4, num_classes=0
)
text_encoder = BertModel(
    BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
    )
)
loss = ClipLoss()
cache = GradCache((image_encoder, text_encoder), loss, chunk_size=64)
parameters = torch.nn.ModuleList([image_encoder, text_encoder, loss]).parameters()
optimizer = torch.optim.AdamW(parameters, lr=1e-3)

for step, batch in zip(range(steps), ImageCaptionLoader(shards, batch_size=512), strict=False):
    optimizer.zero_grad()
    out = cache(batch.images / 255, tokenizer(batch.captions))  # forward and backward
    optimizer.step()
    print(f"step {step}  loss {out.loss:.3f}  in-batch accuracy {out.accuracy:.1%}")
