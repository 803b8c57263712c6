"""Mixtral and the balance of its router, two ways: python examples/mixture_of_experts.py"""

import torch
from torch.nn.functional import one_hot
from transformers import MixtralConfig, MixtralModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from gradcache_clip import GradCache, InfoNCELoss


class Encoder(MixtralModel):
    def forward(self, ids):
        out = super().forward(ids, output_router_logits=True)
        logits = torch.stack(out.router_logits).unflatten(1, ids.shape)
        chosen = one_hot(logits.topk(2).indices, 8).sum(-2).float()
        rows = {"routed": logits.softmax(-1).mean((0, 2)), "chosen": chosen.mean((0, 2))}
        balance = load_balancing_loss_func(out.router_logits, 8)
        return {"text": out.last_hidden_state[:, -1], "balance": balance, **rows}


def loss(*sides):
    # Of the whole batch: a product of means over all rows, which only the loss is given.
    balance = sum(8 * (x["routed"].mean(0) * x["chosen"].mean(0)).sum() for x in sides)
    contrast = InfoNCELoss()(*(x["text"] for x in sides)).loss
    return {"loss": contrast + 0.1 * balance, "contrast": contrast, "balance": balance}


torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
model, texts = Encoder(MixtralConfig(**sizes)), torch.randint(3, 50, (2, 64, 8)).unbind()
one_shot = [model(ids) for ids in texts]
balance = sum(x["balance"] for x in one_shot)
truth = torch.autograd.grad(loss(*one_shot)["contrast"] + 0.1 * balance, [*model.parameters()])
alone = {"balance": 0.1}, lambda *sides: loss(*sides)["contrast"]
for losses, function in alone, ({"balance": 0.0}, loss):
    model.zero_grad()
    print(GradCache([model] * 2, function, chunk_size=10, auxiliary_losses=losses)(*texts))
    errors = [(p.grad - g).abs().max() for p, g in zip(model.parameters(), truth, strict=True)]
    print(f"one shot: balance {balance:.4f}; largest error of a gradient: {max(errors):.1e}")
