"""A ViT and a BERT under the Trainer of transformers: batches of 512 pairs, chunks of 64.

python examples/data/glyphs.py data/glyphs && python examples/trainer_training.py data/glyphs
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertModel,
    TrainingArguments,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from gradcache_clip.integrations.transformers import GradCacheTrainer
from gradcache_clip.train.data import read_all, read_captions
from gradcache_clip.train.evaluation import recall_at_k
from gradcache_clip.train.tokenizer import train_tokenizer

folder = sys.argv[1] if len(sys.argv) > 1 else "data/glyphs"
if not Path(folder).is_dir():
    sys.exit(f"{folder} is missing: run python examples/data/glyphs.py {folder}")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100
tokenizer = train_tokenizer(read_captions(f"{folder}/train"), vocab_size=2000, context_length=24)


def pairs_of(split: str) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    samples = list(read_all(f"{folder}/{split}"))
    tokens = tokenizer([sample.captions[0] for sample in samples], pad_to_context=True)
    rows = zip(tokens["input_ids"], tokens["attention_mask"], samples, strict=True)
    pairs = [
        {"pixel_values": scaled(sample.image), "input_ids": ids, "attention_mask": mask}
        for ids, mask, sample in rows
    ]
    groups = {sample.group: index for index, sample in enumerate(samples)}
    return pairs, torch.tensor([groups[sample.group] for sample in samples])


def scaled(image: torch.Tensor) -> torch.Tensor:
    """To mean 0 and deviation 1: the pages of glyphs are white."""
    return (image / 255 - 0.93) / 0.24


def recall(prediction) -> dict[str, float]:
    images, texts = (F.normalize(torch.from_numpy(each)) for each in prediction.predictions)
    found = recall_at_k(images, texts, image_ids=characters, text_ids=characters, ks=(1, 10))
    return found.to_scalars()


width = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
# The default, 0.02, suits wider models: these would hardly learn in so few steps.
width["initializer_range"] = 128**-0.5
model = VisionTextDualEncoderModel(
    vision_model=ViTModel(ViTConfig(**width, image_size=64, patch_size=16, num_hidden_layers=4)),
    text_model=BertModel(BertConfig(**width, vocab_size=tokenizer.vocab_size, num_hidden_layers=2)),
)
train, _ = pairs_of("train")
validation, characters = pairs_of("validation")
arguments = TrainingArguments(
    output_dir="runs/trainer",
    per_device_train_batch_size=512,
    per_device_eval_batch_size=512,
    learning_rate=1e-3,
    warmup_steps=5,
    max_steps=steps,
    logging_steps=5,
    report_to=[],
)
trainer = GradCacheTrainer(
    model,
    arguments,
    train_dataset=train,
    eval_dataset=validation,
    compute_metrics=recall,
    chunk_size=64,
)
trainer.train()
print(trainer.evaluate())
