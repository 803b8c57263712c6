"""A tiny Qwen2.5-VL becomes an embedder of drawn shapes: python examples/vlm_embedder.py

A query has no, one or two images; its document names their shapes. For a pretrained model replace
`model` and `processor` by AutoModel.from_pretrained(name) and AutoProcessor.from_pretrained(name).
"""

import random
import sys

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    TrainingArguments,
)

from gradcache_clip import InfoNCELoss, PackedPatches
from gradcache_clip.integrations.transformers import GradCacheTrainer

SPECIAL = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "cyan"]
SHAPES = ["ellipse", "rectangle", "line"]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60


def build_processor() -> Qwen2_5_VLProcessor:
    vocabulary = [*SPECIAL, "find", "and", *COLORS, *SHAPES]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": SPECIAL[0], "additional_special_tokens": SPECIAL[1:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    size = {"shortest_edge": 16**2, "longest_edge": 24**2}
    images = Qwen2VLImageProcessor(patch_size=4, temporal_patch_size=1, size=size)
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())


def build_model(vocabulary: int) -> Qwen2_5_VLModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    text |= {"vocab_size": vocabulary, "initializer_range": 0.1, "use_cache": False}
    text |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "patch_size": 4, "temporal_patch_size": 1}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.1}
    tokens = {"vision_start_token_id": 1, "vision_end_token_id": 2}
    tokens |= {"image_token_id": 3, "video_token_id": 4}
    return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))


def draw(color: str, shape: str) -> Image.Image:
    width, height = random.choice([(16, 24), (24, 24), (24, 16)])
    image = Image.new("RGB", (width, height), "white")
    left, top = random.randint(1, 5), random.randint(1, 5)
    box = left, top, width - random.randint(2, 5), height - random.randint(2, 5)
    getattr(ImageDraw.Draw(image), shape)(box, fill=color, width=3)
    return image


def pair(things: list[tuple[str, str]], *, shown: bool) -> dict:
    names = " and ".join(" ".join(thing) for thing in things)
    if not shown:
        return {"query": f"find {names}", "images": [], "document": names}
    images = [draw(*thing) for thing in things]
    return {"query": f"{IMAGE * len(images)} find", "images": images, "document": names}


def collate(rows: list[dict]) -> dict:
    images = [image for row in rows for image in row["images"]] or None
    options = {"padding": True, "return_tensors": "pt"}
    queries = processor(text=[row["query"] for row in rows], images=images, **options)
    documents = processor(text=[row["document"] for row in rows], **options)
    return {"query": queries, "document": documents}


def recall(prediction) -> dict[str, float]:
    queries, documents = (functional.normalize(torch.tensor(x)) for x in prediction.predictions)
    found = (queries @ documents.T).argmax(1)
    return {"recall_at_1": (found == torch.arange(len(found))).float().mean().item()}


random.seed(0)
torch.manual_seed(0)
processor = build_processor()
model = build_model(len(processor.tokenizer))
model.contrast = InfoNCELoss(symmetric=True)  # part of the model, which the optimizer trains
things = [(color, shape) for color in COLORS for shape in SHAPES]
train = [
    pair(random.sample(things, random.choice([1, 1, 2])), shown=random.random() < 0.9)
    for _ in range(128 * steps)
]
trainer = GradCacheTrainer(
    model,
    TrainingArguments(
        output_dir="runs/vlm",
        per_device_train_batch_size=128,
        per_device_eval_batch_size=len(things),
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        max_steps=steps,
        logging_steps=10,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    ),
    train_dataset=train,
    eval_dataset=[pair([thing], shown=True) for thing in things],
    data_collator=collate,
    compute_metrics=recall,
    chunk_size=16,
    rows=[PackedPatches(), None],
    pooling="last",
    loss=lambda model, queries, documents: model.contrast(queries, documents),
)
trainer.train()
print(trainer.evaluate())
