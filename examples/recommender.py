"""Two towers for recommendations, with the log q correction: python examples/recommender.py

Users like items of their taste, and all like popular ones. In-batch negatives are as popular as
what was watched, so a softmax over them unlearns popularity, unless each candidate's logit is
lowered by the logarithm of its share in the data (Yi et al. 2019). The interactions are drawn.
"""

import torch
from torch import nn

from gradcache_clip import GradCache, RetrievalLoss

USERS, ITEMS, HISTORY, BATCH, STEPS = 2000, 500, 20, 1024, 60

torch.manual_seed(0)
tastes, kinds = torch.randn(USERS, 8), torch.randn(ITEMS, 8)
popularity = -torch.arange(1, ITEMS + 1).log()
chances = (0.7 * tastes @ kinds.T + popularity).softmax(1)
# What each user watched, and what they will watch next.
watched = torch.multinomial(chances, HISTORY + 1)
past, future = watched[:, :-1], watched[:, -1]
share = torch.bincount(past.flatten(), minlength=ITEMS).clamp(min=1) / past.numel()


class Users(nn.Module):
    """The mean of what a user watched."""

    def __init__(self):
        super().__init__()
        self.items, self.layers = nn.EmbeddingBag(ITEMS, 32), nn.Linear(32, 32)

    def forward(self, history):
        return self.layers(self.items(history))


def recall(correct: bool) -> float:
    """Train, and find the share of users whose next item is among the ten best."""
    torch.manual_seed(1)
    users, items = Users(), nn.Embedding(ITEMS, 32)
    loss = RetrievalLoss(normalize=False, init_logit_scale=1.0)
    cache = GradCache([users, items], loss, chunk_size=128)
    optimizer = torch.optim.Adam([*users.parameters(), *items.parameters()], lr=0.02)
    for _ in range(STEPS):
        rows, place = torch.randint(USERS, (BATCH,)), torch.randint(HISTORY, (BATCH,))
        chosen = past[rows, place]
        # The item itself is left out of the history; equal items are no negatives.
        rest = past[rows][torch.arange(HISTORY) != place[:, None]].view(BATCH, HISTORY - 1)
        bias = {"column_bias": -share[chosen].log()} if correct else {}
        cache(rest, chosen, loss_kwargs={"ids": chosen, **bias})
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        scores = users(past) @ items.weight.T
    best = scores.scatter(1, past, -torch.inf).topk(10).indices
    return (best == future[:, None]).any(1).float().mean().item()


if __name__ == "__main__":
    for name, correct in (("without", False), ("with", True)):
        print(f"recall at 10 {name} the correction: {recall(correct):.1%}")
