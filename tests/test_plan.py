"""The planner as a function and as a command: laws, errors, and what it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_pairs import CARD, SIZES, model_config

import gradcache_clip
from gradcache_clip.cli import main
from gradcache_clip.memory import Plan, PlanOptions, find_card, plan_work
from gradcache_clip.memory.cards import cards
from gradcache_clip.memory.plan_answer import memory_of, methods_of, speed_of
from gradcache_clip.memory.plan_models import build_on_meta, configured_pair, train_last
from gradcache_clip.memory.plan_work import Traced, trace_all
from gradcache_clip.memory.schedules import accumulated_step, cached_step, kept_bytes, plain_step

ROOT = Path(__file__).parent.parent
_SMALL = PlanOptions(batch_size=4096, chunk_size=16, image_size=32, context_length=16)
_PAIR = ("convnext_atto", "bert-tiny", "RTX 4090")


@pytest.fixture(scope="module")
def planned() -> Plan:
    return gradcache_clip.plan(*_PAIR, _SMALL)


@pytest.fixture(scope="module")
def traced() -> Traced:
    return trace_all(build_on_meta(model_config("vit"), SIZES), SIZES, _SMALL, CARD)


@pytest.fixture(scope="module")
def work(traced):
    return traced.step


def _with(**changes) -> Plan:
    return gradcache_clip.plan(*_PAIR, dataclasses.replace(_SMALL, **changes))


def test_a_larger_batch_never_needs_less(work):
    # Hypothesis would print a work, which is long, with every example.
    @settings(max_examples=30, deadline=None)
    @given(st.integers(2, 5000), st.integers(0, 200), st.sampled_from([1, 16, 100]))
    def law(rows, more, chunk):
        # By whole chunks: the graph of the last one, which may be smaller, waits for the loss.
        sizes = rows, rows + more * chunk
        for step in (plain_step, accumulated_step, cached_step):
            less, most = (step(work, n, chunk).peak().nbytes for n in sizes)
            assert less <= most

    law()


def test_a_larger_chunk_never_needs_less(work):
    peaks = [cached_step(work, 4096, 2**power).peak().nbytes for power in range(13)]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("rows", [1600, 16_000, 64_000])
def test_a_cached_step_grows_by_features_inputs_and_statistics_alone(work, rows):
    before, after = (cached_step(work, count, 16).peak_of("replay") for count in (rows, 2 * rows))
    inputs = sum(tower.input_bytes for tower in work.towers) * rows
    features = 2 * sum(tower.feature_bytes for tower in work.towers) * rows
    assert after.nbytes - before.nbytes == pytest.approx(inputs + features, abs=4096)
    on_host = dataclasses.replace(work, inputs_on_device=False)
    grown = [cached_step(on_host, count, 16).peak_of("replay").nbytes for count in (rows, 2 * rows)]
    assert grown[1] - grown[0] == pytest.approx(features, abs=4096)


def test_what_a_plan_holds(planned):
    parameters = planned.image_parameters + planned.text_parameters
    assert planned.trained_parameters == parameters
    assert planned.gradient_bytes == 4 * parameters
    assert planned.optimizer_bytes == 8 * parameters
    assert planned.parameter_bytes >= 4 * parameters
    assert planned.feature_bytes == 4 * 4096 * 512 * 2
    assert planned.peak_bytes == max(
        planned.embed_peak_bytes, planned.loss_peak_bytes, planned.replay_peak_bytes
    )
    for phase, kinds in planned.kinds_by_phase.items():
        assert sum(kinds.values()) == getattr(planned, f"{phase}_peak_bytes")
    reserved = planned.peak_bytes + planned.allocator_bytes
    assert planned.total_bytes == reserved + _SMALL.context_bytes
    assert planned.fits and planned.largest_chunk >= 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        planned.fits = False


def test_caching_holds_the_largest_batch(planned):
    largest = {method.name: method.largest_batch for method in planned.methods}
    plain, checkpointed, accumulated, cached, kept = largest.values()
    assert 0 < plain < checkpointed < cached and 0 < accumulated < cached and 0 < kept < cached
    for method in planned.methods:
        batches, sizes = zip(*method.curve, strict=True)
        assert list(sizes) == sorted(sizes) and batches[0] == 32


def test_the_largest_batch_fits_and_the_next_does_not(traced):
    capacity, options = 2**30, dataclasses.replace(_SMALL, batch_device="host")
    methods = methods_of(traced, options, capacity)
    largest = {method.name: method.largest_batch for method in methods}["gradient caching"]
    for rows, fits in ((largest, True), (largest + largest // 50, False)):
        more = dataclasses.replace(options, batch_size=rows)
        assert memory_of(traced.step, more, capacity)["fits"] is fits
        assert memory_of(traced.step, more, 2 * capacity)["fits"]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_divides_what_its_stage_says(work, zero):
    options = dataclasses.replace(_SMALL, batch_size=4 * 4096, world_size=4, zero=zero)
    divided = dataclasses.replace(work, shares=plan_work._shares(options), world_size=4)
    found, whole = (memory_of(each, options, 2**34) for each in (divided, work))
    for place, name in enumerate(("optimizer", "gradient", "parameter")):
        expected = whole[f"{name}_bytes"] // (4 if place < zero else 1)
        assert found[f"{name}_bytes"] == pytest.approx(expected, abs=4)
    states = found["kinds_by_phase"]["embed"]["optimizer"]
    assert (states < whole["kinds_by_phase"]["embed"]["optimizer"] / 2) is (zero > 0)


def test_processes_gather_features_and_replay_both_towers_at_once(work):
    options = dataclasses.replace(_SMALL, batch_size=4 * 4096, world_size=4)
    alone = memory_of(work, dataclasses.replace(_SMALL, batch_size=4096), 2**34)
    several = memory_of(dataclasses.replace(work, world_size=4), options, 2**34)
    gathered = 3 * 4096 * sum(tower.feature_bytes for tower in work.towers)
    assert several["kinds_by_phase"]["loss"]["feature"] >= gathered
    graphs = alone["image_graph_bytes"] + alone["text_graph_bytes"]
    assert several["kinds_by_phase"]["replay"]["activation"] > 0.8 * graphs


def test_frozen_parts_need_no_gradients_states_or_graph(planned):
    frozen = _with(image_trainable=0.0)
    assert frozen.trained_parameters < planned.trained_parameters
    assert frozen.image_graph_bytes < planned.image_graph_bytes / 10
    encoder = build_on_meta(model_config("vit"), SIZES)
    train_last(encoder.image_tower.backbone, 0.5)
    backbone = list(encoder.image_tower.backbone.parameters())
    trained = [parameter.requires_grad for parameter in backbone]
    assert trained == sorted(trained) and 0 < sum(trained) < len(trained), "the first are frozen"
    numbers = sum(parameter.numel() for parameter in backbone if parameter.requires_grad)
    assert numbers <= 0.5 * sum(parameter.numel() for parameter in backbone)


def test_checkpointing_spares_memory_and_costs_flops(planned):
    checkpointed = _with(checkpointing=True)
    assert checkpointed.image_graph_bytes < planned.image_graph_bytes
    assert checkpointed.flops > planned.flops


def test_a_budget_keeps_graphs(work):
    without = memory_of(work, _SMALL, 2**34)
    graph = kept_bytes(work.towers[0], 16)
    options = dataclasses.replace(_SMALL, memory_budget=10 * graph)
    some = memory_of(work, options, 2**34)
    assert some["kept_chunks"] == (10, 0), "those of the first tower first"
    grown = some["loss_peak_bytes"] - without["loss_peak_bytes"]
    # And the casts that they share.
    assert 10 * graph <= grown <= 10 * graph + without["image_graph_bytes"]
    auto = dataclasses.replace(_SMALL, memory_budget="auto")
    # One more text graph is kept in any case.
    assert memory_of(work, auto, 2**34)["kept_chunks"] == (256, 255)
    images, texts = memory_of(work, auto, 2**28)["kept_chunks"]
    assert 0 < images <= 256 and texts < 255
    shares = [speed_of(work, each, CARD, 2**34)["recomputed_share"] for each in (_SMALL, auto)]
    assert shares[1] == 0 < shares[0]


def test_time_is_flops_over_the_rate_of_the_card(planned):
    rate = find_card("RTX 4090").rate("bf16")
    assert planned.least_step_ms == pytest.approx(1e3 * planned.flops / rate)
    assert 0 < planned.recomputed_share < 0.34
    assert gradcache_clip.plan(*_PAIR[:2], "24GB", _SMALL).least_step_ms is None


def test_a_plan_becomes_json(planned):
    again = json.loads(json.dumps(planned.to_dict()))
    assert again["options"]["batch_size"] == 4096 and again["card"]["name"] == "RTX 4090"


def test_cards_are_complete_and_have_sources():
    assert len(cards()) >= 15
    for card in cards():
        assert card.source and card.memory_bytes > 2**33 and card.rate("fp32")
        assert find_card(card.name) == card


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("RTX 3060", "RTX 3060 12GB"),
        ("Tesla T4", "T4"),
        ("A100-80GB", "A100 80GB"),
    ],
)
def test_a_card_by_other_spellings(name, card):
    assert find_card(name).name == card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convnext_atto", "bert-tiny", "RTX 4900"), r"gpu: .*got 'RTX 4900'; did you mean .*4090"),
        (("convnext_ato", "bert-tiny", "24GB"), r"image: .*did you mean 'convnext_atto"),
        (("convnext_atto", "bert-tine", "24GB"), r"text: .*did you mean 'bert-tiny'"),
        (("convnext_atto", "t5", "24GB"), r"model.text: expected a text encoder"),
        (("convnext_atto", "bert-tiny", "H100"), r"did you mean 'H100 SXM' or 'H100 PCIe'"),
        (("convnext_atto", "bert-tiny", "RTX 4060"), r"did you mean .*'RTX 4060 Ti 16GB'"),
        (("convnext_atto", "bert-tiny", "0.4GB"), r"context_bytes: expected less than the 0.4 GiB"),
    ],
)
def test_unknown_names_are_met_with_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        gradcache_clip.plan(*arguments, _SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size: expected at least 2, got 1"),
        ({"chunk_size": 0}, "chunk_size: expected a positive integer, got 0"),
        ({"precision": "fp8"}, "precision: expected fp32 or tf32 or bf16 or fp16, got 'fp8'"),
        ({"optimizer": "adamx"}, "optimizer: expected adamw or"),
        ({"zero": 4}, "zero: expected 0, 1, 2 or 3"),
        ({"image_trainable": 1.5}, "image_trainable: expected a share"),
        (
            {"batch_size": 10, "world_size": 4},
            "batch_size: expected a multiple of world_size=4, got 10",
        ),
        ({"memory_budget": "lots"}, "memory_budget: expected an amount of memory, got 'lots'"),
        ({"memory_budget": "30GB"}, "memory_budget: expected less than the 24.0 GiB"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        _with(**changes)


def test_the_command_prints_and_draws(tmp_path, capsys):
    models = ["--image", "convnext_atto", "--text", "bert-tiny", "--image-size", "32"]
    where = ["--gpu", "RTX 4090", "--output", str(tmp_path / "new")]
    status = main(["plan", *models, *where, "--batch-size", "4096"])
    assert status == 0
    out = capsys.readouterr().out
    for words in (
        "Batch 4,096 fits on RTX 4090",
        "optimizer states",
        "peak of the replay",
        "accumulation as in open_clip",
        "Largest chunk",
        "an upper bound of speed",
    ):
        assert words in out
    assert (tmp_path / "new" / "plan.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "new" / "plan.svg").read_text()[:1000]


def test_the_command_plans_a_configuration(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {image: convnext_atto, image_kwargs: {depths: [1, 1, 1, 1]}, "
        "text: bert, text_kwargs: {hidden_size: 128, "
        "num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 512}}\n"
        "data: {image_size: 32, context_length: 16, vocab_size: 30522}\n"
        "train: {batch_size: 4096, chunk_size: 16, precision: bf16}\n"
    )
    arguments = ["plan", str(path), "train.chunk_size=32", "--gpu", "24GB", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["chunk_size"] == 32 and found["least_step_ms"] is None
    assert main([*arguments[:1], str(path), "--gpu", "0.65GB", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["fits"]
    assert main(["plan", str(path), "train.batch_device=host", *arguments[2:]]) == 0
    on_host = json.loads(capsys.readouterr().out)
    assert on_host["input_bytes"] == pytest.approx(found["input_bytes"] * 2 * 32 / 4096, rel=0.01)
    assert main(["plan", str(path), "model.freeze=text", *arguments[2:]]) == 0
    frozen = json.loads(capsys.readouterr().out)
    assert frozen["options"]["text_trainable"] == 0
    assert frozen["optimizer_bytes"] < found["optimizer_bytes"] / 2


def test_vectors_of_patches_and_words_are_counted(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = ["plan", "recipes/filip.yaml", "--gpu", "24GB", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    # 16 patches and 16 words of 64 fp32 numbers, and their gradients.
    features = 2 * 1024 * (16 + 16) * 64 * 4
    assert found["feature_bytes"] == features
    assert found["kinds_by_phase"]["replay"]["feature"] >= features
    inside = [kind for kind in found["kinds_by_phase"]["loss"] if kind.endswith("workspace")]
    assert "gradient workspace" in inside or "statistics workspace" in inside
    assert found["loss_bytes"] > 128 * 2**20, "the panel of the kernels, and unit vectors"
    # As 16 x 16 times as many similarities want, of a text tower and an image tower as small.
    assert main([*arguments[:2], "loss.name=clip", *arguments[2:]]) == 0
    pooled = json.loads(capsys.readouterr().out)
    loss_flops = 8 * 1024**2 * 64 * (16 * 16 - 1)
    assert found["flops"] - pooled["flops"] == pytest.approx(loss_flops, rel=0.05)
    plain, caching = (
        next(method["largest_batch"] for method in found["methods"] if method["name"] == name)
        for name in ("plain", "gradient caching")
    )
    assert plain < caching / 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "24GB"], "plan: expected either a configuration or both --image and --text"),
        (["c.yaml", "--image", "a", "--text", "b", "--gpu", "24GB"], "got both"),
        (["c.yaml", "--gpu", "24GB", "--image-size", "32"], "pass data.image_size=32"),
        (["recipes/simclr.yaml", "--gpu", "24GB"], "got nt_xent, whose views or queue plan"),
        (["recipes/moco.yaml", "--gpu", "24GB"], "plan the same towers with program=pairs"),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_pretrained_text_encoder_is_planned_from_its_configuration(tmp_path):
    from transformers import BertConfig

    from gradcache_clip.train.config_model import DualConfig
    from gradcache_clip.train.programs.pairs import PairData, PairsConfig

    text = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    BertConfig(**text, intermediate_size=96, vocab_size=500).save_pretrained(tmp_path)
    for name, layers, vocab_size in ((str(tmp_path), 3, 500), ("bert-base-uncased", 12, 30522)):
        model = {"text": name, "text_pretrained": True}
        data = {"tokenizer": "bert-base-uncased" if layers == 12 else "train", "vocab_size": 500}
        sections = {"model": DualConfig(**model), "data": PairData(**data)}
        # Whose tokens go with the weights is for training to ask.
        config = PairsConfig().model_copy(update=sections)
        encoder = build_on_meta(*configured_pair(config))
        found = encoder.text_tower.backbone.config
        assert (found.num_hidden_layers, found.vocab_size) == (layers, vocab_size)
