"""GRIT: one decoder embeds and generates, both losses in one step: python examples/grit.py"""

import copy

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from gradcache_clip import GradCache, InfoNCELoss


class Grit(LlamaForCausalLM):
    def forward(self, tower, ids):
        words = ids != 0
        if tower < 2:
            hidden = self.model(ids, words).last_hidden_state * words[..., None]
            return hidden.sum(1) / words.sum(1, keepdim=True)
        logits = super().forward(ids, words).logits[:, :-1].transpose(1, 2)
        losses = cross_entropy(logits, ids[:, 1:], ignore_index=0, reduction="none")
        # Answers differ in length: sums over rows are exact, the mean of chunks' means is not.
        return {"losses": losses.sum(1), "words": words[:, 1:].sum(1)}


def loss(queries, documents, answers):
    contrast = InfoNCELoss()(queries, documents).loss
    generation = answers["losses"].sum() / answers["words"].sum()
    return {"loss": contrast + generation, "contrast": contrast, "generation": generation}


torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
model = Grit(LlamaConfig(**sizes)).double()
one_shot, rows = copy.deepcopy(model), (64, 64, 24)
words = [torch.arange(12) < torch.randint(3, 13, (count, 1)) for count in rows]
texts = [torch.randint(1, 50, mask.shape) * mask for mask in words]
print(GradCache(model, loss, chunk_size=10)(*texts))
loss(*(one_shot(tower, ids) for tower, ids in enumerate(texts)))["loss"].backward()
both = zip(model.parameters(), one_shot.parameters(), strict=True)
print(f"largest error of a gradient: {max((a.grad - b.grad).abs().max() for a, b in both):.1e}")
