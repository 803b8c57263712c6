"""Batches as processors and collators pack them, and tiny models that take them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

IMAGE, VIDEO, START, END, PAD = 101, 102, 103, 104, 0
PATCH = 3 * 2 * 2
"""Numbers in a patch: channels, height, width."""

Grid = tuple[int, int, int]
"""Patches in time, height and width; four of them are one token."""

# Rows without, with one and with two images, and with videos; text tokens of each.
ROWS: list[tuple[list[Grid], list[Grid], int]] = [
    ([], [], 5),
    ([(1, 4, 4)], [], 3),
    ([(1, 2, 4), (1, 4, 2)], [], 2),
    ([], [], 2),
    ([], [(2, 2, 4)], 4),
    ([(1, 6, 4)], [(3, 2, 2)], 1),
    ([], [], 7),
]


def vision_batch(
    rows: Sequence[tuple[list[Grid], list[Grid], int]] = ROWS, *, by_frame: bool = False
) -> dict[str, Any]:
    """Lay tokens and patches out as the processors of the Qwen-VL family do, padded on the left.

    Args:
        by_frame: whether each frame of a video has its own start and end, as in Qwen3-VL.
    """
    tokens, kinds = zip(*(_row(*row, by_frame) for row in rows), strict=True)
    images = [grid for of_row, _, _ in rows for grid in of_row]
    videos = [grid for _, of_row, _ in rows for grid in of_row]
    batch = {
        "input_ids": _padded(tokens),
        "attention_mask": _padded([[1] * len(row) for row in tokens]),
        "mm_token_type_ids": _padded(kinds),
    }
    return {
        **batch,
        **_patches(images, "pixel_values", "image_grid_thw"),
        **_patches(videos, "pixel_values_videos", "video_grid_thw"),
    }


def _patches(grids: list[Grid], pixels: str, key: str) -> dict[str, Tensor]:
    """Patches of all items and their grids; a processor that saw none returns neither key."""
    if not grids:
        return {}
    grid = torch.tensor(grids)
    return {pixels: torch.randn(int(grid.prod(1).sum()), PATCH).double(), key: grid}


def _row(
    images: list[Grid], videos: list[Grid], words: int, by_frame: bool
) -> tuple[list[int], list[int]]:
    tokens = torch.randint(1, 100, (words,)).tolist()
    if by_frame:
        videos = [(1, height, width) for time, height, width in videos for _ in range(time)]
    for token, grids in ((IMAGE, images), (VIDEO, videos)):
        for time, height, width in grids:
            tokens += [START, *[token] * (time * height * width // 4), END]
    tokens.append(int(torch.randint(1, 100, ())))
    return tokens, [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in tokens]


def _padded(rows: Sequence[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])


def vision_models() -> dict[str, Any]:
    """Tiny models of the Qwen-VL family, by name."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLModel,
        Qwen2VLConfig,
        Qwen2VLModel,
        Qwen3VLConfig,
        Qwen3VLModel,
    )

    vision = {
        **{"depth": 2, "num_heads": 2, "patch_size": 2, "temporal_patch_size": 1},
        "spatial_merge_size": 2,
    }
    wide = {**vision, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
    return {
        "Qwen2-VL": lambda: Qwen2VLModel(
            _vision_config(
                Qwen2VLConfig, {**vision, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
            )
        ),
        "Qwen2.5-VL": lambda: Qwen2_5_VLModel(
            _vision_config(
                Qwen2_5_VLConfig, {**wide, "window_size": 8, "fullatt_block_indexes": [1]}
            )
        ),
        "Qwen3-VL": lambda: Qwen3VLModel(
            _vision_config(
                Qwen3VLConfig,
                {**wide, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            )
        ),
    }


def _vision_config(kind: type, vision: dict[str, Any]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 120},
        **{"max_position_embeddings": 256, "rope_parameters": rope},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD},
    }
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    more = {"vision_start_token_id": START, "vision_end_token_id": END}
    return kind(text_config=text, vision_config=vision, **tokens, **more)


class InDouble:
    """torch, whose float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compute_in_double(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model of transformers also compute norms and angles in fp64, which it does in fp32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for name in {type(module).__module__ for module in model.modules()}:
        if name.startswith("transformers."):
            monkeypatch.setattr(sys.modules[name], "torch", InDouble(), raising=False)


class LastToken(nn.Module):
    """Embeds a row by its last token, which padding on the left puts last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs).last_hidden_state[:, -1]


def graph_library() -> Any:
    """torch_geometric, whose import warns of what torch deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch_geometric")


class PackedModernBert(nn.Module):
    """Attends within sequences, by a mask from `cu_seq_lens_q` for lack of flash attention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cu_seq_lens_q: Tensor, max_length_q: int
    ) -> Tensor:
        lengths = cu_seq_lens_q.diff()
        assert max_length_q == lengths.max() and input_ids.shape[1] == cu_seq_lens_q[-1]
        row = torch.arange(len(lengths)).repeat_interleave(lengths)
        same = row[:, None] == row
        near = (
            position_ids[0, :, None] - position_ids[0]
        ).abs() <= self.model.config.sliding_window
        masks = {"full_attention": same[None, None], "sliding_attention": (same & near)[None, None]}
        output = self.model(input_ids=input_ids, position_ids=position_ids, attention_mask=masks)
        hidden = output.last_hidden_state[0]
        return hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, row, hidden)


def packed(lengths: Sequence[int], *, bounds: bool) -> dict[str, Any]:
    """What `DataCollatorWithFlattening` makes of sequences."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = {"input_ids": torch.randint(1, 100, positions.shape), "position_ids": positions}
    if not bounds:
        return batch
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return {**batch, "cu_seq_lens_q": ends, "max_length_q": max(lengths)}


class Molecules(nn.Module):
    def __init__(self, pyg: Any) -> None:
        super().__init__()
        self.convs = nn.ModuleList([pyg.nn.GCNConv(4, 8), pyg.nn.GATConv(8, 5)])
        self.pool = pyg.nn.global_mean_pool

    def forward(self, graphs: Any) -> Tensor:
        hidden = graphs.x
        for conv in self.convs:
            hidden = conv(hidden, graphs.edge_index).relu()
        return self.pool(hidden, graphs.batch)
