"""Gradient caching in a training loop of your own: handwritten digits and their names.

python examples/minimal_loop.py    # seconds on a CPU, no download
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from gradcache_clip import ClipLoss, GradCache, verify

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letters, self.head = nn.EmbeddingBag(128, 64), nn.Linear(64, 32)

    def forward(self, captions: list[str]) -> torch.Tensor:
        letters = [self.letters(torch.tensor([[*text.encode()]])) for text in captions]
        return self.head(torch.cat(letters).relu())


torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images).float() / 16, torch.tensor(digits.target)
image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32))
text_encoder = TextEncoder()

# Two lines wrap the encoders; a third, below, is the step. All else is as without.
loss = ClipLoss()
cache = GradCache((image_encoder, text_encoder), loss, chunk_size=64)

parameters = nn.ModuleList([image_encoder, text_encoder, loss]).parameters()
optimizer = torch.optim.AdamW(parameters, lr=3e-3)
for step in range(40):
    rows = torch.randperm(1500)[:512]
    captions = [NAMES[label] for label in labels[rows]]
    optimizer.zero_grad()
    # Forward and backward over all pairs; those of equal ids are not negatives of each other.
    out = cache(images[rows], captions, loss_kwargs={"ids": labels[rows]})
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}  loss {out.loss:.3f}  in-batch accuracy {out.accuracy:.1%}")

print(verify(cache, images[rows], captions, loss_kwargs={"ids": labels[rows]}))
with torch.no_grad():
    scores = image_encoder(images[1500:]) @ nn.functional.normalize(text_encoder(NAMES)).T
print(f"{(scores.argmax(1) == labels[1500:]).float().mean():.1%} of new digits are named rightly")
