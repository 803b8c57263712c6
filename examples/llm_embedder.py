"""A decoder as text embedder: LoRA, left padding, hard negatives, batches of 256 rows.

pip install peft
python examples/llm_embedder.py data/embedder 30    # on a CPU, no download

Queries are names of numpy and torch functions, documents the first lines of their documentation,
and the hard negative of a name is the document of the next one in the alphabet. The decoder here is
a small untrained Qwen3; for a real one pass its name, such as "Qwen/Qwen3-Embedding-0.6B", to
Transformer, and leave out what makes and saves the small one.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from documented_functions import documented_functions
from peft import LoraConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from gradcache_clip.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss
from gradcache_clip.train.tokenizer import train_tokenizer

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/embedder")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 30

pairs = documented_functions()
documents = [*pairs.values()]
folder.mkdir(parents=True, exist_ok=True)
tokenizer = train_tokenizer([*pairs, *documents], vocab_size=2000, context_length=48)
special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.save(folder)), **special)
fast.save_pretrained(folder)
torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None}
config = Qwen3Config(vocab_size=len(fast), pad_token_id=0, eos_token_id=None, **shape, **heads)
Qwen3Model(config).save_pretrained(folder)

transformer = Transformer(str(folder), processor_kwargs={"padding_side": "left"})
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.05)
transformer.model = get_peft_model(transformer.model, lora)
pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
model = SentenceTransformer(modules=[transformer, pooling], device="cpu")

columns = {"anchor": [*pairs], "positive": documents, "negative": documents[1:] + documents[:1]}
dataset = Dataset.from_dict(columns)
trainer = SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=256,
        per_device_eval_batch_size=256,
        max_steps=steps,
        learning_rate=5e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=dataset,
    eval_dataset=dataset,
    # Chunks of 512 tokens at most, padding included, in few shapes.
    loss=CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=512, pad_to_multiple_of=8),
)
print(f"{len(pairs)} triplets, loss before {trainer.evaluate()['eval_loss']:.3f}")
trainer.train()
print(f"{len(pairs)} triplets, loss after {trainer.evaluate()['eval_loss']:.3f}")
# The adapter becomes part of the weights, so that SentenceTransformer(folder) needs no peft.
transformer.model = transformer.model.merge_and_unload()
model.save(str(folder / "embedder"))
