"""Two random views of an image: what each change does, and that a seed repeats them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_shards import loader, picture, same, take, write, write_tar
from torchvision.transforms.v2 import functional as F

from gradcache_clip.train.data import read_all
from gradcache_clip.train.data.augment import Augmentation
from gradcache_clip.train.data.decode import ImageTransform
from gradcache_clip.train.data.samples import LoaderOptions

NOTHING = Augmentation(flip=0, color_jitter=0, grey=0, blur=0)


def photograph(size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def changed(draw: int = 0, **changes: float) -> np.ndarray:
    augmentation = Augmentation(**{**vars(NOTHING), **changes})
    return np.asarray(augmentation(photograph(), random.Random(draw)))


@pytest.mark.parametrize("draw", range(20))
def test_without_changes_the_image_stays(draw):
    # A hue is turned in another colour space, whose rounding stays.
    difference = changed(draw).astype(int) - np.asarray(photograph())
    assert abs(difference).max() <= 8 and abs(difference).mean() < 2


def test_each_change_is_what_it_says():
    before = np.asarray(photograph())
    # The first draw above 0.8 leaves the colours as they are.
    draw = next(n for n in range(100) if (g := random.Random(n)).random() < 1 and g.random() > 0.8)
    assert (changed(draw) == before).all()
    assert (changed(draw, flip=1) == before[:, ::-1]).all()
    grey = changed(draw, grey=1)
    assert (grey == np.asarray(photograph().convert("L"))[..., None]).all() and grey.std() > 0
    blurred = changed(draw, blur=1).astype(int)
    assert np.diff(blurred, axis=0).std() < 0.8 * np.diff(before.astype(int), axis=0).std()


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_colour_changes_reach_as_far_as_their_strength(strength):
    draw, orders, seen = random.Random(0), set(), {}
    for _ in range(2000):
        changes = Augmentation(color_jitter=strength)._color_changes(draw)
        orders.add(tuple(change.__name__ for change, _ in changes))
        for change, amount in changes:
            seen.setdefault(change, []).append(amount)
    assert len(orders) == 24
    for change in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        assert min(seen[change]) == pytest.approx(1 - 0.8 * strength, abs=0.01)
        assert max(seen[change]) == pytest.approx(1 + 0.8 * strength, abs=0.01)
    assert min(seen[F.adjust_hue]) == pytest.approx(-0.2 * strength, abs=0.01)
    assert max(seen[F.adjust_hue]) == pytest.approx(0.2 * strength, abs=0.01)


def test_how_often_views_change():
    def share(**changes: float) -> float:
        before, count = np.asarray(photograph()), 1000
        images = (changed(draw, **changes) for draw in range(count))
        return sum(bool((image != before).any()) for image in images) / count

    # Four in five change their colours, the turned hue included.
    assert share() == pytest.approx(0.8, abs=0.05)
    assert share(color_jitter=1.0, flip=0.5) == pytest.approx(0.9, abs=0.04)


def test_a_transform_makes_two_views_of_its_own_draws():
    data = picture((10, 200, 30), size=(40, 24))
    transform = ImageTransform(16, (0.2, 1.0), Augmentation())
    first, again, other = (transform(data, random.Random(seed)) for seed in (3, 3, 4))
    assert first.shape == transform.shape == (2, 3, 16, 16) and first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, other)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    transform(data, random.Random(0))
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state


def test_one_view_is_cut_as_before():
    data, draw = picture((1, 2, 3), size=(40, 24)), random.Random(1)
    assert ImageTransform(16, (0.2, 1.0))(data, draw).shape == (3, 16, 16)


def test_a_resumed_loader_gives_the_same_views(tmp_path: Path):
    folder = write(tmp_path, 60)
    views = {"augmentation": Augmentation(), "crop_scale": (0.3, 1.0)}
    whole = take(loader(folder, **views), 9)
    assert whole[0].images.shape == (10, 2, 3, 8, 8)
    first = loader(folder, **views)
    take(first, 4)
    second = loader(folder, **views)
    second.load_state_dict(first.state_dict())
    assert all(same(a, b) for a, b in zip(take(second, 5), whole[4:], strict=True))
    # The next epoch draws other views of the same images.
    by_key = [dict(zip(b.keys, b.images, strict=True)) for b in whole]
    epochs = [{k: v for b in by_key[i : i + 3] for k, v in b.items()} for i in (0, 6)]
    both = epochs[0].keys() & epochs[1].keys()
    assert len(both) > 10 and not any(torch.equal(epochs[0][k], epochs[1][k]) for k in both)


def test_images_without_captions_and_their_labels(tmp_path: Path):
    notes = {"k0.cls": b"7\n", "k1.json": b'{"label": "cat"}', "k2.json": b'{"label": 0}'}
    members = {f"k{i}.png": picture((i, 0, 0)) for i in range(6)} | notes
    # The members of a sample stand together.
    shard = write_tar(tmp_path / "a.tar", dict(sorted(members.items())))
    options = LoaderOptions(image_size=8, captions=False)
    samples = list(read_all(shard, options=options))
    assert [sample.label for sample in samples] == ["7", "cat", "0", "", "", ""]
    assert {sample.captions for sample in samples} == {("",)}
    with pytest.raises(ValueError, match="missing caption"):
        list(itertools.islice(read_all(shard), 9))
