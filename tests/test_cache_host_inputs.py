"""Inputs on the host: which move, where to, and that nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradcache_clip import ClipLoss, FrozenTrunk, GradCache
from gradcache_clip.cache.chunks import even_chunks
from gradcache_clip.cache.host_inputs import HostInputs, device_for

META = torch.device("meta")


def test_a_batch_beside_parameters_on_the_host_stays():
    encoder, inputs = nn.Linear(4, 2), torch.randn(6, 4)
    assert device_for(encoder.parameters(), inputs) is None
    chunk = even_chunks(6, 3)[1]
    taken = HostInputs(inputs, None).take(chunk)
    assert taken.data_ptr() == inputs[3:].data_ptr(), "a chunk on its device is a view"


def test_inputs_go_to_the_one_device_of_the_parameters():
    encoder = nn.Linear(4, 2, device=META)
    assert device_for(encoder.parameters(), {"x": torch.randn(6, 4)}) == META
    assert device_for(encoder.parameters(), {"x": torch.randn(6, 4, device=META)}) is None
    assert device_for(encoder.parameters(), ["a string", "another"]) is None


def test_a_batch_on_both_was_placed_by_the_caller():
    lengths, tokens = torch.ones(6), torch.ones(6, 4, device=META)
    encoder = nn.Linear(4, 2, device=META)
    assert device_for(encoder.parameters(), {"tokens": tokens, "lengths": lengths}) is None


def test_nothing_moves_where_parameters_are_on_several_devices_or_none():
    spread = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device=META))]
    assert device_for(spread, torch.randn(6, 4)) is None
    assert device_for([], torch.randn(6, 4)) is None


def test_only_the_rows_of_a_chunk_move_with_everything_nested_in_them():
    inputs = {"x": torch.randn(6, 4), "texts": list("abcdef"), "there": torch.ones(6, device=META)}
    taken = HostInputs(inputs, META).take(even_chunks(6, 4)[1])
    assert taken["x"].device == META and taken["x"].shape == (2, 4)
    assert taken["there"].device == META and taken["texts"] == ["e", "f"]
    assert inputs["x"].device.type == "cpu", "the caller's batch stays where it is"


def test_what_was_expected_is_taken_and_what_was_not_is_fetched():
    inputs, (first, second) = torch.arange(6.0), even_chunks(6, 3)
    host = HostInputs(inputs, torch.device("cpu"))
    host.expect(second)
    assert host.take(first).tolist() == [0, 1, 2]
    host.expect(first)
    assert host.take(first).tolist() == [0, 1, 2]
    assert host.take(second).tolist() == [3, 4, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("frozen_trunk", [False, True])
def test_a_batch_on_the_host_gives_the_gradients_of_one_on_the_device(pinned, frozen_trunk):
    def gradients(on_host: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        image = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))
        text: nn.Module = nn.Linear(24, 16)
        if frozen_trunk:
            text = FrozenTrunk(nn.Linear(24, 20).requires_grad_(False), nn.Linear(20, 16))
        image, text = image.cuda(), text.cuda()
        batch = torch.randn(64, 32), torch.randn(64, 24)
        if pinned:
            batch = tuple(each.pin_memory() for each in batch)
        if not on_host:
            batch = tuple(each.cuda() for each in batch)
        torch.cuda.manual_seed(1)
        GradCache((image, text), ClipLoss().cuda(), chunk_size=8)(*batch)
        modules = nn.ModuleList([image, text])
        return [p.grad for p in modules.parameters() if p.grad is not None]

    for there, here in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(there, here)
