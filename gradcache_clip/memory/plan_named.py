"""`gradcache-clip plan`: will these models and this batch fit a card? Needs no GPU or weights."""

from __future__ import annotations

import time

from gradcache_clip.memory.plan_options import Plan, PlanOptions


def plan(image: str, text: str, gpu: str, options: PlanOptions | None = None) -> Plan:
    """Plan a step of gradient caching for two models on a card, and find the largest sizes.

    Builds and traces the models on the meta device, so no GPU is needed and no weights are loaded.
    Each tower runs at two numbers of rows; the size of every tensor is extrapolated linearly to the
    batch and chunk in question, and PyTorch's caching allocator is simulated.

    Args:
        image: a timm name.
        text: a short name such as "bert-base", a published name, or a transformers model type.
        gpu: a card such as "RTX 4090", or an amount of memory such as "24GB".
        options: of the step; defaults when None.

    Raises:
        ValueError: an unknown model or card (with the nearest names), or options that contradict
            each other or the card.
        TypeError: a model that is not given by name.
        ModuleNotFoundError: a package that builds the models is missing.

    Example:
        >>> options = PlanOptions(batch_size=4096, chunk_size=32, image_size=32)
        >>> found = plan("convnext_atto", "bert-tiny", "24GB", options)
        >>> found.fits, found.largest_chunk >= 32
        (True, True)
    """
    started, options = time.perf_counter(), options or PlanOptions()
    for which, name in (("image", image), ("text", text)):
        if not isinstance(name, str):
            raise TypeError(
                f"{which}: expected the name of a model, got {type(name).__name__}; count a step "
                "of your own modules with gradcache_clip.memory.count_cached_step(encoders, loss, "
                "example_inputs, ...)"
            )
    try:
        from gradcache_clip.memory.plan_models import build_on_meta, named_pair
        from gradcache_clip.memory.planner import planned

        model, sizes = named_pair(
            image,
            text,
            image_size=options.image_size,
            context_length=options.context_length,
            feature_dim=options.feature_dim,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"plan: expected the package {error.name}, got none; "
            'pip install "gradcache-clip[train]"',
            name=error.name,
        ) from error
    encoder = build_on_meta(model, sizes)
    return planned((image, text), encoder, sizes, gpu, options, started)
