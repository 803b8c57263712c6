"""CoCa of open_clip, its caption loss beside the contrastive one: python examples/coca.py"""

import copy

import open_clip
import torch
from torch.nn import functional, init

from gradcache_clip import GradCache
from gradcache_clip.ops import clip_loss


class Captioning(open_clip.CoCa):
    def forward(self, *pair):
        out = super().forward(*pair)
        logits, words = out["logits"].transpose(1, 2), out["labels"]
        losses = functional.cross_entropy(logits, words, ignore_index=0, reduction="none").sum(1)
        # Captions differ in length: sums over rows are exact, the mean of chunks' means is not.
        sums = {"caption": losses, "words": (words != 0).sum(1)}
        return {"image": out["image_features"], "text": out["text_features"], **sums}


def loss(rows):
    contrast = clip_loss(rows["image"], rows["text"], model.logit_scale.exp())
    caption = rows["caption"].sum() / rows["words"].sum()
    return {"loss": contrast + 2 * caption, "contrast": contrast, "caption": caption}


torch.manual_seed(0)
text = {"width": 32, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 50}
view = {"width": 64, "layers": 1, "image_size": 32, "attentional_pool": True, "output_tokens": True}
model = Captioning(32, text, {**text, "output_tokens": True, "embed_cls": True}, view).double()
init.normal_(model.text_decoder.text_projection, std=0.1)  # open_clip leaves it unset
one_shot, ids = copy.deepcopy(model), torch.randint(1, 50, (64, 8))
pairs = torch.randn(64, 3, 32, 32).double(), ids * (torch.arange(8) < torch.randint(3, 9, (64, 1)))
print(GradCache([model], loss, chunk_size=10)(pairs))
sum(open_clip.CoCaLoss(2, 1)(**open_clip.CoCa.forward(one_shot, *pairs))).backward()
both = zip(model.parameters(), one_shot.parameters(), strict=True)
print(f"largest error of a gradient: {max((a.grad - b.grad).abs().max() for a, b in both):.1e}")
