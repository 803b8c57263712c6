"""Random views of an image: mirrored, in other colours, grey, blurred."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

# Of SimCLR: how often colours change at all, and the blur's deviation in pixels.
_RECOLOURED = 0.8
_SIGMA = (0.1, 2.0)
_Change = tuple[Callable[..., Image.Image], float]


@dataclass(frozen=True)
class Augmentation:
    """How the views of one image differ, beside the crop that comes before.

    All draws come from the generator that a call is given, so a sample's own seed repeats its
    views exactly.

    Args:
        flip: probability to be mirrored.
        color_jitter: strength s of the colour distortion, which four views in five undergo:
            brightness, contrast and saturation change by up to 0.8 s, the hue by up to 0.2 s of
            the circle, in random order.
        grey: probability to lose all colour.
        blur: probability of a Gaussian blur of 0.1 to 2 pixels, over a tenth of the image's side.

    Source:
        Chen et al. 2020 (SimCLR), appendix A; its strength is 1 for ImageNet and 0.5, without
        blur, for CIFAR-10. MoCo v2 uses a strength of 0.5.

    Example:
        >>> image, draw = Image.new("RGB", (8, 8), "red"), random.Random(0)
        >>> Augmentation(grey=1.0)(image, draw).getpixel((0, 0))[0] < 255
        True
    """

    flip: float = 0.5
    color_jitter: float = 1.0
    grey: float = 0.2
    blur: float = 0.5

    def __call__(self, image: Image.Image, draw: random.Random) -> Image.Image:
        """A changed copy of an RGB image, of the same size."""
        from torchvision.transforms.v2 import functional as F

        if draw.random() < self.flip:
            image = F.horizontal_flip(image)
        if draw.random() < _RECOLOURED:
            for change, amount in self._color_changes(draw):
                image = change(image, amount)
        if draw.random() < self.grey:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if draw.random() < self.blur:
            image = F.gaussian_blur(image, _kernel_size(image), draw.uniform(*_SIGMA))
        return image

    def _color_changes(self, draw: random.Random) -> list[_Change]:
        from torchvision.transforms.v2 import functional as F

        reach, hue = 0.8 * self.color_jitter, 0.2 * self.color_jitter
        factors: list[Any] = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
        changes = [(change, draw.uniform(max(0.0, 1 - reach), 1 + reach)) for change in factors]
        changes.append((F.adjust_hue, draw.uniform(-hue, hue)))
        draw.shuffle(changes)
        return changes


def _kernel_size(image: Image.Image) -> int:
    """A tenth of the image's side, odd, and not a single pixel."""
    return max(3, image.height // 10 // 2 * 2 + 1)
