"""Five steps of every recipe on small data: for the golden file, and to compare two commits.

The data depend on no font and on no version of a library: pixels and words come from NumPy's
frozen generator, and PNG stores them losslessly.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

STEPS = 5
SIDE = 32
LABELS = ("dots", "bars", "rings", "grids")
_TEXT = (
    "small large red green old new letter figure square circle line dot hook bar stroke above "
    "below left right open closed double single heavy"
)
_WORDS = _TEXT.split()

_SHORT = (
    "data.workers=0",
    "optimizer.warmup_steps=1",
    "train.batch_size=24",
    "train.chunk_size=10",
    f"train.steps={STEPS}",
    "train.evaluate_every=0",
    "train.device=cpu",
)
_VIEWS, _TEXTS = ("moco_image", "simclr"), ("text_distillation", "text_embedding")
_TINY_BERT = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,"
    " hidden_dropout_prob: 0, attention_probs_dropout_prob: 0, initializer_range: 0.25}"
)
# Takes the place of a pretrained text tower, whose weights may not be on this machine.
_OWN_TEXT_TOWER = (
    "data.tokenizer=train",
    "model.text=bert",
    "model.text_pretrained=false",
    f"model.text_kwargs={_TINY_BERT}",
)
RECIPES: dict[str, tuple[str, ...]] = {
    "beit3": (),
    "clip": (),
    "coco": (
        *_OWN_TEXT_TOWER,
        f"data.image_size={SIDE}",
        "data.context_length=24",
        "model.image=vit_tiny_patch16_224",
        "model.image_kwargs={patch_size: 16, embed_dim: 16, depth: 1, num_heads: 2}",
        "model.image_pretrained=false",
        "model.feature_dim=8",
        "train.precision=fp32",
    ),
    "coco_drawn": (f"data.image_size={SIDE}",),
    "filip": (),
    "lit": (*_OWN_TEXT_TOWER, f"data.image_size={SIDE}"),
    "moco": ("loss.queue_size=60",),
    "moco_image": ("loss.queue_size=60",),
    "siglip": (),
    "simclr": (),
    "text_distillation": (
        *_OWN_TEXT_TOWER,
        "data.context_length=24",
        "train.chunk_tokens=70",
    ),
    "text_embedding": (
        *_OWN_TEXT_TOWER,
        "data.context_length=24",
        "loss.matryoshka=[4,8,16]",
        "train.chunk_tokens=70",
    ),
}
"""Recipe -> what its short run changes beyond the number and size of steps."""


def settings(recipe: str, data: Path, output: Path) -> list[str]:
    """Overrides that make recipes/RECIPE.yaml a short run on the data of `make_data`."""
    pairs = data / ("texts" if recipe in _TEXTS else "pairs")
    places = [f"data.train={pairs}/train", f"data.validation={pairs}/validation"]
    if recipe == "lit":
        places.append(f"model.image_weights={data}/weights/image.safetensors")
    if recipe == "text_distillation":
        places.append(f"loss.teacher={data}/weights/teacher.safetensors")
    sizes = [] if recipe in _VIEWS else ["data.vocab_size=400"]
    sizes += [] if recipe in _TEXTS else ["data.shuffle_buffer=50"]
    return [*_SHORT, *sizes, *RECIPES[recipe], *places, f"train.output={output}"]


def make_data(folder: Path, recipes: Sequence[str] = tuple(RECIPES)) -> Path:
    """Write pairs/ and texts/, and what lit and text_distillation load where they are asked for."""
    draw = np.random.RandomState(0)
    for split, count in (("train", 120), ("validation", 45)):
        _write_pairs(folder / "pairs" / split, count, draw)
        _write_texts(folder / "texts" / split, count, draw)
    if "lit" in recipes:
        _write_image_weights(folder / "weights" / "image.safetensors")
    if "text_distillation" in recipes:
        _write_teacher(folder / "texts" / "train", folder / "weights" / "teacher.safetensors")
    return folder


def _write_pairs(folder: Path, count: int, draw: np.random.RandomState) -> None:
    """Webdataset shards; three images in a row show nearly the same and share a group."""
    folder.mkdir(parents=True)
    for start in range(0, count, 30):
        with tarfile.open(folder / f"shard-{start // 30:06d}.tar", "w") as archive:
            for number in range(start, min(start + 30, count)):
                if number % 3 == 0:
                    blocks, label = draw.randint(0, 200, (4, 4, 3)), draw.randint(len(LABELS))
                _add_pair(archive, number, _picture(blocks, label, draw), label, draw)


def _picture(blocks: np.ndarray, label: int, draw: np.random.RandomState) -> bytes:
    """Coloured blocks with noise; one of the rows is brighter and tells the label."""
    pixels = np.kron(blocks, np.ones((SIDE // 4, SIDE // 4, 1), int))
    pixels = pixels + draw.randint(0, 30, pixels.shape)
    pixels[label * SIDE // 4 : (label + 1) * SIDE // 4] += 25
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _add_pair(
    archive: tarfile.TarFile, number: int, image: bytes, label: int, draw: np.random.RandomState
) -> None:
    # No two captions are the same: equal similarities would leave ranks to rounding.
    captions = [f"{LABELS[label]} {_phrase(draw, 9)} {number}{end}" for end in ("", " again")]
    notes = {"captions": captions, "group": f"g{number // 3}", "label": LABELS[label]}
    for ending, content in (
        ("png", image),
        ("txt", captions[0].encode()),
        ("json", json.dumps(notes).encode()),
    ):
        header = tarfile.TarInfo(f"k{number:04d}.{ending}")
        header.size = len(content)
        archive.addfile(header, io.BytesIO(content))


def _write_texts(folder: Path, count: int, draw: np.random.RandomState) -> None:
    """Triplets; a document is the first two words of its query, so some occur several times."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        first = " ".join(_WORDS[draw.randint(8)] for _ in range(2))
        query = f"{first} {_phrase(draw, 12)} {number}"
        rows.append({"anchor": query, "positive": first, "negative": _phrase(draw, 3)})
    (folder / "all.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _phrase(draw: np.random.RandomState, longest: int) -> str:
    return " ".join(_WORDS[draw.randint(len(_WORDS))] for _ in range(draw.randint(1, longest + 1)))


def _write_image_weights(path: Path) -> None:
    """Stands for LiT's pretrained tower: an untrained one with running statistics."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(11)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=7)
    with torch.no_grad():
        model(torch.randn(6, 3, SIDE, SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)


def _write_teacher(texts: Path, path: Path) -> None:
    """Drawn features in place of those of a larger model."""
    import torch

    from gradcache_clip.train.programs.teacher import save_teacher_features

    draw = np.random.RandomState(3)
    rows = [json.loads(line) for line in (texts / "all.jsonl").read_text().splitlines()]
    sides = ([*dict.fromkeys(row[name] for row in rows)] for name in ("anchor", "positive"))
    save_teacher_features(
        path, *((side, torch.tensor(draw.randn(len(side), 8)).float()) for side in sides)
    )
