"""A sentence-transformers model, trained on batches of 256 pairs in the memory of 16.

python examples/sentence_transformers_training.py data/functions 40    # on a CPU, no download

Pairs are names of numpy and torch functions with the first line of their documentation. Your own
program only needs the import of the loss; the model here is a small untrained one.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from documented_functions import documented_functions
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from gradcache_clip.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss
from gradcache_clip.train.tokenizer import train_tokenizer

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/functions")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40

pairs = documented_functions()
tokenizer = train_tokenizer([*pairs, *pairs.values()], vocab_size=2000, context_length=48)
folder.mkdir(parents=True, exist_ok=True)
special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.save(folder)), **special)
fast.save_pretrained(folder)
torch.manual_seed(0)
shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = BertConfig(vocab_size=tokenizer.vocab_size, intermediate_size=256, **shape)
BertModel(config).save_pretrained(folder)

transformer = Transformer(str(folder))
pooling = Pooling(transformer.get_embedding_dimension(), "mean")
model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
dataset = Dataset.from_dict({"anchor": [*pairs], "positive": [*pairs.values()]})
trainer = SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=256,
        per_device_eval_batch_size=256,
        max_steps=steps,
        learning_rate=2e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=dataset,
    eval_dataset=dataset,
    loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=16),
)
print(f"{len(pairs)} pairs, loss before {trainer.evaluate()['eval_loss']:.3f}")
trainer.train()
print(f"{len(pairs)} pairs, loss after {trainer.evaluate()['eval_loss']:.3f}")
