"""`GradCacheTrainer` in two processes beside one that has the batches of both."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lora_models import contrast, decoder, info_nce, texts, with_lora
from packed_inputs import compute_in_double
from strategy_processes import result_of, run_cases
from tiny_reranker import batches, listwise, reranker, towers
from tiny_trainer import BATCH, BATCHES, STEPS, FirstGradients, clip, pairs, trainer

from gradcache_clip.distributed import gather_rows, strategy_all_reduce
from gradcache_clip.integrations.transformers import GradCacheTrainer


def on_each_rank(folder: Path, accumulated: int) -> dict[str, Any]:
    """Half of every batch; the weights of rank 1 start out wrong."""
    # All ranks are on this machine, which a launcher would say.
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    model, counted = clip(torch.float64), count_reductions()
    if dist.get_rank() == 1:
        for parameter in model.parameters():
            parameter.data.add_(0.5)
    data = pairs(torch.float64, BATCH * STEPS * accumulated)
    seen = FirstGradients()
    ours = trainer(
        GradCacheTrainer,
        model,
        folder,
        data,
        chunk_size=4,
        per_device_train_batch_size=BATCH // 2,
        per_device_eval_batch_size=BATCH // 2,
        gradient_accumulation_steps=accumulated,
        eval_dataset=data,
        ddp_backend="gloo",
        callbacks=[seen],
    )
    ours.train()
    return {
        "kind": ours.accelerator.distributed_type.value,
        "reductions": len(counted),
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "gradient": {name: value.norm().item() for name, value in seen.gradients.items()},
        "eval_loss": ours.evaluate()["eval_loss"],
    }


def embedder_on_each_rank(folder: Path) -> dict[str, Any]:
    """A batch of its own on each rank, in fp64; a checkpointed LoRA makes leaves in its forward."""
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    seen = FirstGradients()
    with pytest.MonkeyPatch.context() as patch:
        run = embedder(patch)
        more = {**BATCHES, "max_grad_norm": 0.0, "ddp_backend": "gloo", "callbacks": [seen]}
        more |= {"pooling": "last", "loss": info_nce}
        trainer(GradCacheTrainer, run, folder, two_batches() * STEPS, **more).train()
    return {name: gradient.tolist() for name, gradient in seen.gradients.items()}


def reranker_on_each_rank(folder: Path) -> dict[str, Any]:
    """Queries of its own on each rank; what a loss of these alone gives, and one of all."""
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    seen = FirstGradients()
    more = {**BATCHES, "max_grad_norm": 0.0, "ddp_backend": "gloo", "callbacks": [seen]}
    more |= {"towers": towers, "max_steps": 1}
    build = functools.partial(trainer, GradCacheTrainer, reranker(), folder, batches(), **more)
    with pytest.raises(ValueError, match="loss: expected that of the rows of all.*gather_rows"):
        build(loss=listwise).train()
    build(loss=lambda model, scores: listwise(model, gather_rows(scores))).train()
    return {name: gradient.tolist() for name, gradient in seen.gradients.items()}


def embedder(patch: pytest.MonkeyPatch) -> torch.nn.Module:
    torch.manual_seed(5)
    model = with_lora(decoder()).double()
    compute_in_double(model, patch)
    return model


def two_batches() -> list[dict[str, Any]]:
    torch.manual_seed(6)
    return [{"query": texts(6, "left"), "document": texts(6, "left")} for _ in range(2)]


def count_reductions() -> list[int]:
    """Numbers of parameters in each bucket that is reduced from here on."""
    counted, average = [], strategy_all_reduce._average

    def counting(bucket):
        counted.append(len(bucket))
        average(bucket)

    strategy_all_reduce._average = counting
    return counted


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path):
    cases = {
        f"accumulated-{n}": functools.partial(on_each_rank, tmp_path / "out", n) for n in (1, 2)
    }
    cases["embedder"] = functools.partial(embedder_on_each_rank, tmp_path / "out")
    cases["reranker"] = functools.partial(reranker_on_each_rank, tmp_path / "out")
    results = run_cases(cases, 2, tmp_path)
    assert_same_embedder(result_of(results, "embedder"))
    assert_same_reranker(result_of(results, "reranker"))
    for accumulated in (1, 2):
        found = result_of(results, f"accumulated-{accumulated}")
        assert (found["kind"], found["reductions"]) == ("MULTI_CPU", STEPS)
        data, model = pairs(torch.float64, BATCH * STEPS * accumulated), clip(torch.float64)
        alone = trainer(
            GradCacheTrainer,
            model,
            tmp_path,
            data,
            chunk_size=4,
            gradient_accumulation_steps=accumulated,
            per_device_eval_batch_size=BATCH,
            eval_dataset=data,
        )
        alone.train()
        for name, expected in model.state_dict().items():
            got = torch.tensor(found["weights"][name], dtype=expected.dtype)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, msg=name)
        assert math.isclose(found["eval_loss"], alone.evaluate()["eval_loss"], rel_tol=1e-5)


def assert_same_embedder(gradients: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        truth = embedder(patch)
        sides = [
            torch.cat([truth(**batch[side]).last_hidden_state[:, -1] for batch in two_batches()])
            for side in ("query", "document")
        ]
        contrast(*sides).loss.backward()
    assert_same(gradients, truth)


def assert_same_reranker(gradients: dict[str, Any]) -> None:
    truth = reranker()
    for batch in batches()[:2]:
        (listwise(truth, truth(**batch["pairs"]).logits) / 2).backward()
    assert_same(gradients, truth)


def assert_same(gradients: dict[str, Any], truth: torch.nn.Module) -> None:
    expected = {name: p.grad for name, p in truth.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        got = torch.tensor(gradients[name], dtype=torch.float64)
        torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-14, msg=name)
