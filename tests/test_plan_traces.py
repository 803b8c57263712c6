"""Traced steps against the same counter on real ones, and the allocator against its rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_pairs import measured, model_config, real, traced
from torch import nn

from gradcache_clip.memory.allocator import MIB, CachingAllocator, DoesNotFit
from gradcache_clip.memory.device_rules import DeviceRules
from gradcache_clip.memory.loss_trace import full_matrix_loss, tiled_loss, trace_loss, workspaces
from gradcache_clip.memory.plan_models import checkpoint_blocks
from gradcache_clip.memory.schedules import accumulated_step, all_kept, cached_step, plain_step
from gradcache_clip.memory.timeline import Timeline
from gradcache_clip.memory.tower_trace import trace_tower

_STEPS = {
    "plain": plain_step,
    "accumulated": accumulated_step,
    "cached": cached_step,
    "all kept": lambda work, rows, chunk: cached_step(
        work, rows, chunk, kept=all_kept(work, rows, chunk)
    ),
}


@pytest.mark.filterwarnings("ignore:batch norm in train mode")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("image", ["vit", "convnext", "resnet"])
def test_steps_are_predicted_within_two_percent(image, autocast):
    model = model_config(image)
    encoder = real(model)
    work = traced(model, precision="bf16" if autocast else "fp32")
    for rows in (4, 18):
        for kind, step in _STEPS.items():
            found = measured(encoder, kind, rows, 4, autocast=autocast)
            # Kept graphs share casts, whose 16-bit gradients then wait for the end of a backward.
            within = 0.08 if autocast and kind == "all kept" else 0.02
            predicted = step(work, rows, 4).peak().nbytes
            assert predicted == pytest.approx(found, rel=within), (kind, rows)


@pytest.mark.parametrize(("image", "autocast"), [("vit", False), ("convnext", True)])
def test_steps_over_tokens_are_predicted_within_two_percent(image, autocast):
    model = model_config(image)
    encoder = real(model, tokens=True)
    work = traced(model, tokens=True, precision="bf16" if autocast else "fp32")
    for rows in (4, 96):
        for kind in ("plain", "cached", "all kept"):
            found = measured(encoder, kind, rows, 4, autocast=autocast)
            within = 0.08 if autocast and kind == "all kept" else 0.02
            predicted = _STEPS[kind](work, rows, 4).peak().nbytes
            assert predicted == pytest.approx(found, rel=within), (kind, rows)


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_steps_are_predicted_within_two_percent(autocast):
    model = model_config("convnext")
    encoder = real(model)
    checkpoint_blocks(encoder)
    work = traced(model, checkpointed=True, precision="bf16" if autocast else "fp32")
    for kind in ("plain", "accumulated", "cached"):
        step, found = _STEPS[kind], measured(encoder, kind, 32, 8, autocast=autocast)
        assert step(work, 32, 8).peak().nbytes == pytest.approx(found, rel=0.02), kind


def test_sizes_are_extrapolated_exactly():
    work = traced(model_config("convnext"), precision="bf16", device_kind="cuda")
    direct = _at_rows(37)
    for tower, other in zip(work.towers, direct.towers, strict=True):
        assert (tower.trace.sizes(37) == other.trace.sizes(37)).all()
        assert tower.trace.flops("backward replay", 37) == other.trace.flops("backward replay", 37)


def _at_rows(rows):
    from gradcache_clip.memory import tower_trace

    before, tower_trace._ROWS = tower_trace._ROWS, (rows, rows + 1)
    try:
        return traced(model_config("convnext"), precision="bf16", device_kind="cuda")
    finally:
        tower_trace._ROWS = before


def test_flops_of_a_linear_tower_by_hand():
    with torch.device("meta"):
        tower = nn.Linear(8, 4)
    trace = trace_tower(tower, tower, lambda rows: torch.empty(rows, 8, device="meta"))
    assert trace.flops("forward plain", 100) == 2 * 100 * 8 * 4
    # The input needs no gradient.
    assert trace.flops("backward plain", 100) == 2 * 100 * 8 * 4


def test_a_matrix_of_all_pairs_grows_with_its_square():
    full, tiled = (
        trace_loss(loss, [(8,), (8,)], features=torch.float32)
        for loss in (full_matrix_loss(), tiled_loss())
    )
    assert full.sizes(10_000).max() == 4 * 10_000**2
    assert tiled.sizes(10_000).max() < 100 * 10_000
    assert {"statistics workspace", "gradient workspace"} < set(tiled.kinds)


def test_workspaces_are_bounded_as_the_kernels_are():
    pytest.importorskip("triton")
    from gradcache_clip.kernels.launch_config import table_entry

    for architecture, large in ((80, True), (86, False), (89, False), (90, True), (100, True)):
        entry = table_entry(architecture, torch.bfloat16)
        found = workspaces(2**20, 2**20, 1, 2, large=large)
        assert found["statistics workspace"] == entry.workspace_bytes
        assert found["gradient workspace"] >= entry.workspace_bytes


def test_a_module_that_needs_data_is_named():
    class NeedsData(nn.Module):
        def forward(self, x):
            return x[: int(x.sum().item())]

    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(8, 4), NeedsData())
    with pytest.raises(ValueError, match=r"module '1' \(NeedsData\): expected ops whose shapes"):
        trace_tower(module, module, lambda rows: torch.empty(rows, 8, device="meta"))


@pytest.mark.parametrize("masked", [False, True])
def test_cuda_attention_keeps_no_matrix_of_tokens(masked):
    q = torch.empty(2, 4, 512, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.empty(2, 1, 512, 512, device="meta", dtype=torch.bool) if masked else None
    saved = []

    def keep(tensor):
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), DeviceRules("cuda"):
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=0.1)
    # A mask of a row of tokens against all others, once for all heads, and nothing larger.
    assert max(saved) <= 2 * 2 * 512 * 512


def test_autocast_of_cuda():
    x = torch.empty(4, 8, device="meta")
    linear = nn.Linear(8, 8, device="meta")
    casts = []
    rules = DeviceRules("cuda", torch.bfloat16)
    rules.on_cast = casts.append
    with rules:
        out = linear(x)
        again = linear(x)
        assert out.dtype == again.dtype == torch.bfloat16
        assert (x @ x.T).dtype == torch.bfloat16
        assert F.layer_norm(out, (8,)).dtype == torch.float32
        assert F.softmax(out, -1).dtype == torch.float32
        assert (out + x).dtype == torch.float32
    assert len(casts) == 2, "weight and bias, once"
    with DeviceRules("cpu", torch.bfloat16):
        assert F.layer_norm(linear(x), (8,)).dtype == torch.bfloat16


def test_segments_of_the_allocator():
    allocator = CachingAllocator()
    sizes = [1, MIB, MIB + 1, 10 * MIB - 512, 10 * MIB, 10 * MIB + 512]
    reserved = [allocator.allocate(size) and allocator.reserved // MIB for size in sizes]
    # Two small ones share 2 MiB, two below 10 MiB share 20 MiB, larger ones have their own.
    assert reserved == [2, 2, 22, 22, 32, 44]


def test_the_allocator_gives_back_before_it_gives_up():
    allocator = CachingAllocator(64 * MIB)
    allocator.free(allocator.allocate(40 * MIB))
    allocator.allocate(50 * MIB)
    assert allocator.reserved == 50 * MIB
    with pytest.raises(DoesNotFit):
        allocator.allocate(20 * MIB)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.booleans()), max_size=40))
def test_blocks_never_overlap_and_merge_again(requests):
    allocator, blocks = CachingAllocator(), []
    for size, keep in requests:
        block = allocator.allocate(size)
        assert block.size >= size and not block.free
        blocks.append(block)
        if not keep:
            allocator.free(blocks.pop(0))
        assert allocator.allocated == sum(each.size for each in blocks) <= allocator.reserved
    for block in blocks:
        allocator.free(block)
    assert allocator.allocated == 0
    allocator._release_cached()
    assert allocator.reserved == 0, "every segment is one free block again"


def test_a_timeline_by_hand():
    timeline = Timeline(shares={"optimizer": 0.5})
    timeline.enter("start")
    held = timeline.hold([1024, 1024], "optimizer")
    timeline.enter("work")
    work = timeline.hold([513], "activation")
    timeline.drop(work)
    timeline.drop(held)
    peak = timeline.peak()
    assert (peak.nbytes, peak.phase) == (2048, "work")
    assert peak.by_kind == {"optimizer": 1024, "activation": 1024}
    assert timeline.live_at("work") == 1024
    assert timeline.reserved() == 2 * MIB
