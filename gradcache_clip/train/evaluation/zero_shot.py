"""Zero-shot classification of images by texts that name the classes.

N images, C classes, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.train.evaluation.features import TokenFeatures, longest_of, scores_of
from gradcache_clip.train.evaluation.ranking import (
    ROUNDING,
    check_features,
    check_ids,
    check_sizes,
    exact_fp32,
    ranks_of_best_right,
    recall_of,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def zero_shot_classification(
    image_features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    class_text_features: Float[Tensor, "c d"],
    *,
    ks: Sequence[int] = (1, 5),
    tile: int = 1024,
) -> dict[int, float]:
    """Compute the top-k accuracy of assigning each image to the most similar class text.

    Args:
        image_features: one row per image.
        labels: class index of each image, 0 to C - 1.
        class_text_features: one row per class, e.g. from `zero_shot_classifier`.
        ks: depths; accuracy is 1 for k of at least C.
        tile: rows and columns of a block of the score matrix.

    Returns:
        k -> share of images whose class is among the first k; ties count against the model.

    Raises:
        ValueError: as for `recall_at_k`, or a label outside 0 to C - 1.

    Source:
        Radford et al. 2021, section 3.1.2.

    Example:
        >>> zero_shot_classification(torch.eye(3), torch.tensor([0, 1, 1]), torch.eye(3), ks=(3,))
        {3: 1.0}
    """
    check_features("image_features", image_features, tile)
    check_features("class_text_features", class_text_features, tile)
    check_sizes("image_features", image_features, "class_text_features", class_text_features)
    check_ids("labels", labels, image_features, below=len(class_text_features))
    classes = torch.arange(len(class_text_features), device=image_features.device)
    labels = labels.to(image_features.device)
    ranks = ranks_of_best_right(image_features, labels, class_text_features, classes, tile=tile)
    return recall_of(ranks, ks)


def zero_shot_by_tokens(
    image_features: TokenFeatures,
    labels: Int[Tensor, " n"],
    prompt_features: TokenFeatures,
    *,
    templates: int = 1,
    ks: Sequence[int] = (1, 5),
    tile: int = 256,
) -> dict[int, float]:
    """Compute the top-k accuracy of assigning each image to the class with the best mean score.

    Token vectors of several texts cannot be averaged, so their scores are. Memory beyond the
    features: a tile of images times all texts.

    Args:
        image_features: N images.
        labels: class index of each image, 0 to C - 1.
        prompt_features: C x `templates` texts, class by class, as from `prompts_of`.
        templates: texts per class.
        ks, tile: as for `zero_shot_classification`.

    Raises:
        ValueError: as for `zero_shot_classification`, or the number of texts is not a multiple of
            `templates`.

    Source:
        Yao et al. 2021 (FILIP), "Prompt ensemble and templates".

    Example:
        >>> side = TokenFeatures(torch.eye(3)[:, None], torch.ones(3, 1, dtype=torch.bool))
        >>> zero_shot_by_tokens(side, torch.tensor([0, 1, 1]), side, ks=(1,))[1] * 3
        2.0
    """
    check_features("image_features", image_features, tile)
    check_features("prompt_features", prompt_features, tile)
    check_sizes("image_features", image_features, "prompt_features", prompt_features)
    classes, rest = divmod(len(prompt_features), templates)
    if rest:
        raise ValueError(
            f"prompt_features: expected a multiple of {templates} texts, one for each template of "
            f"each class, got {len(prompt_features)}; write them with prompts_of"
        )
    check_ids("labels", labels, image_features, below=classes)
    blocks = zip(image_features.split(tile), labels.split(tile), strict=True)
    with exact_fp32(image_features.device):
        ranks = [_ranks(*block, prompt_features, templates) for block in blocks]
    return recall_of(torch.cat(ranks), ks)


@torch.no_grad()
def _ranks(images: TokenFeatures, labels: Tensor, prompts: TokenFeatures, templates: int) -> Tensor:
    """Return the rank of the right class: the number of classes that score at least as high."""
    scores = scores_of(images, prompts).unflatten(1, (-1, templates)).mean(2)  # (N, C)
    right = scores.gather(1, labels.to(scores.device)[:, None])
    rounding = ROUNDING * longest_of(images)[:, None] * longest_of(prompts).max()
    return (scores >= right - rounding).sum(1)


def zero_shot_classifier(
    encode_text: Callable[[list[str]], Float[Tensor, "b d"]],
    class_names: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}.",),
    *,
    batch_size: int = 256,
) -> Float[Tensor, "c d"]:
    """Compute one feature per class: the normalised mean of its texts' normalised features.

    Args:
        encode_text: texts -> features, one row per text.
        class_names: replace `{}` in the templates.
        templates: sentences with one `{}`; averaging over several reduces noise.
        batch_size: texts encoded at once.

    Returns:
        Unit rows in fp32, in the order of `class_names`.

    Raises:
        ValueError: no class, no template, or a template without `{}`.

    Source:
        Radford et al. 2021, section 3.1.4 (prompt ensembling over the embedding space).

    Example:
        >>> zero_shot_classifier(lambda texts: torch.ones(len(texts), 4), ["cat", "dog"]).shape
        torch.Size([2, 4])
    """
    texts = prompts_of(class_names, templates)
    batches = (texts[i : i + batch_size] for i in range(0, len(texts), batch_size))
    with torch.no_grad():
        features = torch.cat([encode_text(batch).float() for batch in batches])
    unit = torch.nn.functional.normalize(features, dim=-1)
    means = unit.unflatten(0, (len(class_names), len(templates))).mean(1)  # (C, D)
    return torch.nn.functional.normalize(means, dim=-1)


def prompts_of(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return the texts of each class, one per template, class by class.

    Raises:
        ValueError: no class, no template, or a template without `{}`.

    Example:
        >>> prompts_of(["cat", "dog"], ["a {}", "{}s"])
        ['a cat', 'cats', 'a dog', 'dogs']
    """
    if not class_names:
        raise ValueError("class_names: expected at least one name, got none; pass e.g. ['cat']")
    lacking = [template for template in templates if "{}" not in template]
    if lacking or not templates:
        raise ValueError(
            f"templates: expected texts with a {{}} for the class name, got {lacking or 'none'}; "
            "pass e.g. ('a photo of a {}.',)"
        )
    return [template.replace("{}", name) for name in class_names for template in templates]
