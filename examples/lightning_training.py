"""A ViT and a BERT under Lightning: batches of 512 pairs, chunks of 64.

python examples/data/glyphs.py data/glyphs && python examples/lightning_training.py data/glyphs
"""

import sys
from pathlib import Path

import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.integrations.lightning import cached_step
from gradcache_clip.train.data import read_all, read_captions
from gradcache_clip.train.tokenizer import Tokenizer, train_tokenizer


class Pairs(LightningModule):
    def __init__(self, image_encoder: torch.nn.Module, text_encoder: torch.nn.Module) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder, self.loss = image_encoder, text_encoder, ClipLoss()
        self.cache = GradCache((image_encoder, text_encoder), self.loss, chunk_size=64)

    def training_step(self, batch, _):
        out = cached_step(self, self.cache, *batch)
        self.log_dict({"loss": out.loss, "accuracy": out.accuracy}, prog_bar=True)
        return out.loss

    def validation_step(self, batch, _):
        out = cached_step(self, self.cache, *batch)
        self.log_dict({"val_loss": out.loss, "val_accuracy": out.accuracy}, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=5)
        return [optimizer], [{"scheduler": warm_up, "interval": "step"}]


def pairs_of(shards: str, tokenizer: Tokenizer, batch_size: int) -> DataLoader:
    samples = list(read_all(shards))
    tokens = tokenizer([sample.captions[0] for sample in samples], pad_to_context=True)
    pairs = [
        (scaled(sample.image), {name: rows[index] for name, rows in tokens.items()})
        for index, sample in enumerate(samples)
    ]
    return DataLoader(pairs, batch_size, shuffle="train" in shards, drop_last=True)


def scaled(image: torch.Tensor) -> torch.Tensor:
    """To mean 0 and deviation 1: the pages of glyphs are white."""
    return (image / 255 - 0.93) / 0.24


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "data/glyphs"
    if not Path(folder).is_dir():
        sys.exit(f"{folder} is missing: run python examples/data/glyphs.py {folder}")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    captions = read_captions(f"{folder}/train")
    tokenizer = train_tokenizer(captions, vocab_size=2000, context_length=24)
    # Initial weights by Xavier's rule: the default deviation, 0.02, suits wider models.
    image_encoder = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=128, depth=4, num_heads=4, num_classes=0,
        weight_init="jax",
    )  # fmt: skip
    text_encoder = BertModel(
        BertConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=512,
            initializer_range=128**-0.5,
        )
    )
    # On several GPUs: Trainer(strategy="ddp", devices=8, ...); the batch is that of all of them.
    trainer = Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        default_root_dir="runs/lightning",
    )
    trainer.fit(
        Pairs(image_encoder, text_encoder),
        pairs_of(f"{folder}/train", tokenizer, 512),
        pairs_of(f"{folder}/validation", tokenizer, 64),
    )
