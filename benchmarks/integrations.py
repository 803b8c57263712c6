"""The drop-ins for other libraries, each beside what the library itself offers.

    python benchmarks/integrations.py --wordnet /usr/share/wordnet   # some 25 minutes on two cores
    python benchmarks/integrations.py "token kl" tokens              # these; other rows stay
    python benchmarks/integrations.py --quick                        # small sizes; ten minutes
    python benchmarks/integrations.py --redraw                       # the table of the last run

Of each case: how far loss and gradients are from the library's, the time of a step against its
step (both in one process, taking turns), and the growth of a fresh process's peak memory. Writes
integrations.csv into benchmarks/results (or --results), a row when its case is measured.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from engine_steps import Bert, SentenceEmbedding, image_text, lemma_gloss
from fresh_process import (
    Limits,
    PeakGrowth,
    call_in_fresh_process,
    distance,
    from_zero,
    interleaved_times_ms,
)
from results import (
    UNMEASURED,
    bytes_text,
    paragraph,
    parser,
    power,
    provenance,
    read_rows,
    show,
    table,
    write_rows,
)
from torch import Tensor, nn

from gradcache_clip import GradCache

_FILE = "integrations.csv"
_LIBRARIES = ("open_clip", "sentence_transformers", "transformers", "lightning")
OURS, THEIRS = "ours", "theirs"


@dataclass(frozen=True)
class Row:
    """One measured case."""

    drop_in: str
    beside: str
    pairs: int
    loss_error: float
    """Relative difference of the two losses."""
    gradient_error: float
    """Relative, all gradients as one vector."""
    time_ratio: float
    """Step of the library over step of the drop-in: the median of rounds."""
    step_ms: float
    """Median time of a step of the drop-in."""
    rounds: int
    peak_growth_bytes: int
    """Measured on the drop-in."""
    their_peak_growth_bytes: int
    shapes: int = 0
    """Distinct shapes of chunks in a step of the drop-in, where chunks have any."""
    their_shapes: int = 0
    origin: dict[str, str] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --redraw read, then print the table."""
    options = _parser().parse_args(arguments)
    path = options.results / _FILE
    for name in () if options.redraw else _chosen(options):
        write_rows(Row, _with(_measured(name, options), path), path)
    show(section(options.results))


def _with(row: Row, path: Path) -> list[Row]:
    """The rows of earlier runs and this one, in the order of the cases."""
    earlier = read_rows(Row, path) if path.exists() else []
    found = {(each.drop_in, each.beside): each for each in (*earlier, row)}
    return [found[case[:2]] for case in CASES.values() if case[:2] in found]


def _chosen(options: argparse.Namespace) -> Iterator[str]:
    for name in options.cases:
        if name == "sentences" and not (options.wordnet / "data.noun").exists():
            print(f"sentences: no WordNet in {options.wordnet}; see --wordnet")
        else:
            yield name


def _measured(name: str, options: argparse.Namespace) -> Row:
    case = CASES[name]
    given = {"case": name, "wordnet": str(options.wordnet), "rounds": options.rounds}
    given |= {"pairs": case.few if options.quick else case.pairs, "seconds": options.seconds}
    limits = Limits(threads=options.threads)
    peaks = []
    for side in (OURS, THEIRS):
        outcome = call_in_fresh_process(measure_memory, {**given, "side": side}, limits)
        peaks.append(outcome.values["bytes"])
    times = call_in_fresh_process(measure_times, given, limits).values
    return Row(
        case.drop_in,
        case.beside,
        given["pairs"],
        **times,
        peak_growth_bytes=peaks[0],
        their_peak_growth_bytes=peaks[1],
        origin=provenance(),
    )


# Measurements, each in a process of its own


def measure_memory(arguments: dict[str, Any]) -> dict[str, Any]:
    """Peak growth of one side's step, after a small step of its own."""
    case, folder = CASES[arguments["case"]], Path(arguments["wordnet"])
    case.build(arguments["side"], case.few, folder).step()
    run = case.build(arguments["side"], arguments["pairs"], folder)
    with PeakGrowth() as peak:
        run.step()
    return {"bytes": peak.bytes}


def measure_times(arguments: dict[str, Any]) -> dict[str, Any]:
    """Interleaved times of both sides, and how far the drop-in is from the library."""
    case, folder = CASES[arguments["case"]], Path(arguments["wordnet"])
    ours, theirs = (case.build(side, arguments["pairs"], folder) for side in (OURS, THEIRS))
    loss, their_loss = ours.step(), theirs.step()
    pairs = zip(ours.leaves, theirs.leaves, strict=True)
    gradients = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
    error = distance(*zip(*gradients, strict=True))
    steps = [from_zero(run.step, run.leaves) for run in (ours, theirs)]
    for run in (ours, theirs):
        # Those of the checks of a first step.
        run.shapes.clear()
    rounds = interleaved_times_ms(steps, arguments["rounds"], arguments["seconds"])
    return {
        "loss_error": abs(loss - their_loss) / abs(their_loss),
        "gradient_error": error,
        "time_ratio": median(their / our for our, their in rounds),
        "step_ms": median(our for our, _ in rounds),
        "rounds": len(rounds),
        "shapes": len(ours.shapes),
        "their_shapes": len(theirs.shapes),
    }


# The drop-ins beside the libraries themselves


@dataclass
class Run:
    """One side of a case."""

    step: Callable[[], float]
    """Adds to `.grad` of the leaves; returns the loss."""
    leaves: Sequence[Tensor]
    shapes: set[torch.Size] = field(default_factory=set)
    """Of token ids that the model was given, added by its steps."""


class Case(NamedTuple):
    """A drop-in, what it stands in for, and how to build either side for a number of pairs."""

    drop_in: str
    beside: str
    pairs: int
    few: int
    """Pairs of a quick run, and of the step before a measurement."""
    build: Callable[[str, int, Path], Run]
    """Called with the side, the pairs and WordNet's folder."""


def _backward(loss: Tensor) -> float:
    loss.backward()
    return loss.item()


def _features(name: str, side: str, pairs: int, folder: Path) -> Run:
    """A loss of open_clip's over features of width 512."""
    library = _losses_of_open_clip(side)
    torch.manual_seed(0)
    features = [nn.functional.normalize(torch.randn(pairs, 512)).requires_grad_() for _ in "it"]
    scalars = [torch.tensor(value, requires_grad=True) for value in (20.0, -8.0)]
    leaves, loss = [*features, *scalars], getattr(library, name)()
    return Run(lambda: _backward(loss(*leaves)), leaves)


def _losses_of_open_clip(side: str) -> Any:
    ours = "gradcache_clip.integrations.open_clip"
    return import_module(ours if side == OURS else "open_clip.loss")


def _distilled(side: str, pairs: int, folder: Path) -> Run:
    """Features of width 512 beside those of a teacher, of width 768."""
    torch.manual_seed(0)
    widths = 512, 512, 768, 768
    features = [nn.functional.normalize(torch.randn(pairs, width)) for width in widths]
    scale = torch.tensor(20.0, requires_grad=True)
    leaves = [*(each.requires_grad_() for each in features[:2]), scale]
    loss = _losses_of_open_clip(side).DistillClipLoss()
    return Run(lambda: _backward(sum(loss(*leaves, *features[2:], torch.tensor(50.0)))), leaves)


def _clip(side: str, pairs: int, folder: Path) -> Run:
    return _features("ClipLoss", side, pairs, folder)


def _siglip(side: str, pairs: int, folder: Path) -> Run:
    return _features("SigLipLoss", side, pairs, folder)


def _open_clip_model(side: str, pairs: int, folder: Path) -> Run:
    """A ViT on 64-pixel images and a text tower of open_clip, chunks of 32 or one graph."""
    import open_clip

    from gradcache_clip.integrations.open_clip import ClipLoss, OpenClipTowers

    torch.manual_seed(0)
    text = {"context_length": 32, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 6}
    vision = {"image_size": 64, "patch_size": 8, "width": 384, "head_width": 64, "layers": 6}
    model = open_clip.CLIP(256, vision_cfg=vision, text_cfg=text, output_dict=True)
    images, texts = torch.randn(pairs, 3, 64, 64), torch.randint(1, 49408, (pairs, 32))
    leaves = list(model.parameters())
    if side == OURS:
        towers = OpenClipTowers(model)
        cache = GradCache(towers, towers.loss_with(ClipLoss()), chunk_size=32)
        return Run(lambda: cache(images, texts).loss.item(), leaves)
    loss = open_clip.ClipLoss()
    return Run(lambda: _backward(loss(**model(images, texts))), leaves)


def _sentences(side: str, pairs: int, folder: Path) -> Run:
    """WordNet's lemmas and glosses through an encoder of the shape of MiniLM, chunks of 32."""
    if side == OURS:
        from gradcache_clip.integrations import sentence_transformers as library
    else:
        from sentence_transformers.sentence_transformer import losses as library
    work = lemma_gloss(pairs, folder, small=pairs < 256)
    model = nn.Sequential(SentenceEmbedding(work.encoders[0]))
    loss = library.CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)

    def step() -> float:
        return _backward(loss([dict(given) for given in work.inputs], torch.empty(0)))

    return Run(step, list(model.parameters()))


class _LastToken(nn.Module):
    """A Qwen3 as sentence-transformers calls it, and the shapes of token ids that it was given."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Qwen3Config, Qwen3Model

        torch.manual_seed(0)
        size = {"hidden_size": 192, "intermediate_size": 512, "head_dim": 32, "use_cache": False}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
        self.decoder = Qwen3Model(Qwen3Config(vocab_size=10000, **size, **heads))
        self.shapes: set[torch.Size] = set()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        self.shapes.add(features["input_ids"].shape)
        given = {name: features[name] for name in ("input_ids", "attention_mask")}
        return {"sentence_embedding": self.decoder(**given).last_hidden_state[:, -1]}


def _left_padded(rows: int, median_length: int, longest: int) -> dict[str, Tensor]:
    """Token ids whose lengths are log-normal, as those of texts are."""
    lengths = (torch.randn(rows).mul(0.8).exp() * median_length).long().clamp(3, longest)
    mask = (torch.arange(longest) >= longest - lengths[:, None])[:, longest - lengths.max() :]
    return {
        "input_ids": torch.randint(1, 10000, mask.shape) * mask,
        "attention_mask": mask.long(),
    }


def _decoder(side: str, pairs: int, folder: Path) -> Run:
    """Short queries and longer documents, padded on the left, chunks of 2,048 tokens."""
    options: dict[str, Any] = {"mini_batch_num_tokens": 2048}
    if side == OURS:
        from gradcache_clip.integrations import sentence_transformers as library

        options["pad_to_multiple_of"] = 64
    else:
        from sentence_transformers.sentence_transformer import losses as library
    last_token = _LastToken()
    model = nn.Sequential(last_token)
    columns = [_left_padded(pairs, 10, 64), _left_padded(pairs, 60, 384)]
    loss = library.CachedMultipleNegativesRankingLoss(model, **options)

    def step() -> float:
        return _backward(loss([dict(given) for given in columns], torch.empty(0)))

    return Run(step, list(model.parameters()), last_token.shapes)


def _with_tokenizer(layers: int) -> nn.Module:
    """An encoder of the width of MiniLM, with a vocabulary, as a guide must have one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model: Any = nn.Sequential(SentenceEmbedding(Bert(384, layers, 12)))
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    model.tokenizer, model.max_seq_length = PreTrainedTokenizerFast(tokenizer_object=words), 128
    return model


def _triplets(rows: int) -> list[dict[str, Tensor]]:
    """Short queries, longer documents and a hard negative each, padded on the right."""
    columns = [_left_padded(rows, median, longest) for median, longest in ((10, 64), (40, 128))]
    columns.append(_left_padded(rows, 40, 128))
    return [{name: given.flip(1) for name, given in column.items()} for column in columns]


def _distils_or_ranks(name: str, side: str, pairs: int, folder: Path) -> Run:
    """A loss of sentence-transformers over triplets, chunks of 32 where it has chunks."""
    from sentence_transformers.sentence_transformer import losses as theirs

    from gradcache_clip.integrations import sentence_transformers as ours

    torch.manual_seed(0)
    model, columns = _with_tokenizer(2), _triplets(pairs)
    labels = torch.randn(pairs, 2)
    options: dict[str, Any] = {}
    if name == "MultipleNegativesRankingLoss":
        every = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
        options = {"directions": every, "hardness_mode": "all_negatives", "hardness_strength": 9.0}
    if name == "GISTEmbedLoss":
        options["guide"] = _with_tokenizer(1).eval()
    cached = hasattr(theirs, f"Cached{name}")
    if side == OURS or cached:
        options["mini_batch_size"] = 32
    library = ours if side == OURS else theirs
    loss = getattr(library, f"Cached{name}" if side == OURS or cached else name)(model, **options)

    def step() -> float:
        return _backward(loss([dict(given) for given in columns], labels))

    return Run(step, list(model.parameters()))


class _TokenVectors(nn.Module):
    """A vector of width 128 for each token, as a MultiVectorEncoder returns them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.narrow = Bert(384, 2, 12), nn.Linear(384, 128)

    def forward(self, input: dict[str, Tensor], task: str = "") -> dict[str, Tensor]:
        hidden = self.encoder.bert(**{k: input[k] for k in ("input_ids", "attention_mask")})
        vectors = nn.functional.normalize(self.narrow(hidden.last_hidden_state), dim=-1)
        return {**input, "token_embeddings": vectors}


def _over_tokens(name: str, side: str, pairs: int, folder: Path) -> Run:
    """A loss over token vectors of triplets, chunks of 32 where it has chunks."""
    from sentence_transformers.multi_vector_encoder import losses as theirs

    from gradcache_clip.integrations import sentence_transformers_multi_vector as ours

    model, columns, labels = _TokenVectors(), _triplets(pairs), torch.randn(pairs, 2)
    cached = f"Cached{name}"
    known = cached if side == OURS or hasattr(theirs, cached) else name
    loss = getattr(ours if side == OURS else theirs, known)(model, mini_batch_size=32)

    def step() -> float:
        return _backward(loss([dict(given) for given in columns], labels))

    return Run(step, list(model.parameters()))


def _pairs_of_models(pairs: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A ViT on 64-pixel images and a BERT, as transformers joins them, and a batch."""
    from transformers import BertConfig, BertModel, VisionTextDualEncoderModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    size = {"num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = VisionTextDualEncoderModel(
        vision_model=ViTModel(ViTConfig(hidden_size=384, image_size=64, patch_size=8, **size)),
        text_model=BertModel(BertConfig(hidden_size=384, **size, **dropout)),
    )
    batch = {
        "pixel_values": torch.randn(pairs, 3, 64, 64),
        "input_ids": torch.randint(1, 30000, (pairs, 32)),
        "attention_mask": torch.ones(pairs, 32, dtype=torch.long),
    }
    return model, batch


def _trainer(side: str, pairs: int, folder: Path) -> Run:
    """A step of a Trainer: the loss and its backward."""
    from transformers import Trainer, TrainingArguments

    from gradcache_clip.integrations.transformers import GradCacheTrainer

    model, batch = _pairs_of_models(pairs)
    arguments = TrainingArguments(tempfile.mkdtemp(), report_to=[], use_cpu=True)
    if side == OURS:
        trainer: Any = GradCacheTrainer(model, arguments, train_dataset=range(pairs), chunk_size=32)
    else:
        trainer = Trainer(model, arguments, train_dataset=range(pairs))
    batch |= {} if side == OURS else {"return_loss": True}
    return Run(lambda: _backward(trainer.compute_loss(model, batch)), list(model.parameters()))


def _lightning(side: str, pairs: int, folder: Path) -> Run:
    """A fit of one step; the rate is 0, so that each fit starts from the same weights."""
    from lightning.pytorch import LightningModule, Trainer

    from gradcache_clip import ClipLoss
    from gradcache_clip.integrations.lightning import cached_step

    work = image_text(pairs, small=pairs < 128)

    class Pairs(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = work.encoders
            self.loss = ClipLoss(impl="auto" if side == OURS else "reference")
            self.cache = GradCache((self.image, self.text), self.loss, chunk_size=32)
            self.last = 0.0

        def training_step(self, _: Any, __: int) -> Tensor:
            images, tokens = work.inputs
            if side == OURS:
                out = cached_step(self, self.cache, images, tokens)
            else:
                out = self.loss(self.image(images), self.text(**tokens))
            self.last = float(out.loss.detach())
            return out.loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Pairs()

    def step() -> float:
        Trainer(
            max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        ).fit(module, [torch.zeros(1)])  # fmt: skip
        return module.last

    return Run(step, list(module.parameters()))


CASES = {
    "clip": Case("open_clip.ClipLoss", "open_clip's ClipLoss", 8192, 256, _clip),
    "siglip": Case("open_clip.SigLipLoss", "open_clip's SigLipLoss", 8192, 256, _siglip),
    "distilled": Case(
        "open_clip.DistillClipLoss", "open_clip's DistillClipLoss", 8192, 256, _distilled
    ),
    "model": Case(
        "open_clip.OpenClipTowers in GradCache", "open_clip's plain step", 512, 64, _open_clip_model
    ),
    "sentences": Case(
        "sentence_transformers.CachedMultipleNegativesRankingLoss",
        "sentence-transformers' loss of this name",
        1024,
        128,
        _sentences,
    ),
    "decoder": Case(
        "sentence_transformers.CachedMultipleNegativesRankingLoss",
        "its own: texts padded on the left, 2,048 tokens a chunk",
        256,
        64,
        _decoder,
    ),
    "directions": Case(
        "sentence_transformers.CachedMultipleNegativesRankingLoss",
        "its own: all directions, all negatives weighed, triplets",
        128,
        64,
        partial(_distils_or_ranks, "MultipleNegativesRankingLoss"),
    ),
    "guide": Case(
        "sentence_transformers.CachedGISTEmbedLoss",
        "sentence-transformers' loss of this name, triplets",
        128,
        64,
        partial(_distils_or_ranks, "GISTEmbedLoss"),
    ),
    "margins": Case(
        "sentence_transformers.CachedMarginMSELoss",
        "sentence-transformers' MarginMSELoss, one graph",
        128,
        64,
        partial(_distils_or_ranks, "MarginMSELoss"),
    ),
    "kl": Case(
        "sentence_transformers.CachedDistillKLDivLoss",
        "sentence-transformers' DistillKLDivLoss, one graph",
        128,
        64,
        partial(_distils_or_ranks, "DistillKLDivLoss"),
    ),
    "tokens": Case(
        "sentence_transformers.CachedMultiVectorMultipleNegativesRankingLoss",
        "sentence-transformers' loss of this name, triplets",
        128,
        64,
        partial(_over_tokens, "MultiVectorMultipleNegativesRankingLoss"),
    ),
    "token margins": Case(
        "sentence_transformers.CachedMultiVectorMarginMSELoss",
        "sentence-transformers' MultiVectorMarginMSELoss, one graph",
        128,
        64,
        partial(_over_tokens, "MultiVectorMarginMSELoss"),
    ),
    "token kl": Case(
        "sentence_transformers.CachedMultiVectorDistillKLDivLoss",
        "sentence-transformers' MultiVectorDistillKLDivLoss, one graph",
        128,
        64,
        partial(_over_tokens, "MultiVectorDistillKLDivLoss"),
    ),
    "trainer": Case("transformers.GradCacheTrainer", "transformers' Trainer", 256, 32, _trainer),
    "lightning": Case("lightning.cached_step", "Lightning's own step", 256, 32, _lightning),
}


# The section of docs/benchmarks.md, and the tables on the pages of the libraries


def section(results: Path) -> str:
    """Each drop-in beside what the library itself offers."""
    text = (
        "Both sides of a case have equal weights and inputs. Time: median ratio of steps that take "
        "turns in one process. Memory: growth of the peak of a fresh process."
    )
    return f"{paragraph(text)}\n\n{quoted(results)}"


def quoted(results: Path, library: str = "") -> str:
    """A line per drop-in, or per drop-in of one library."""
    path = results / _FILE
    rows = read_rows(Row, path) if path.exists() else []
    head = (
        *("drop-in", "beside", "pairs", "loss differs by", "gradients differ by"),
        *("their time over ours", "memory", "theirs"),
    )
    lines = [_line(row) for row in rows if row.drop_in.startswith(library)]
    return table(head, lines, "llrrrrrr") if lines else UNMEASURED


def _line(row: Row) -> list[str]:
    return [
        f"`{row.drop_in.split('.', 1)[1]}`",
        row.beside + f"; {row.shapes} shapes, there {row.their_shapes}" * bool(row.shapes),
        f"{row.pairs:,}",
        power(row.loss_error),
        power(row.gradient_error),
        f"{row.time_ratio:.2f}",
        bytes_text(row.peak_growth_bytes),
        bytes_text(row.their_peak_growth_bytes),
    ]


BLOCKS: dict[str, Callable[[Path], str]] = {
    f"integrations-{name}": partial(quoted, library=f"{name}.") for name in _LIBRARIES
}


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add = made.add_argument
    add("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)} (all)")
    add("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="(default: %(default)s)")
    add("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    add("--seconds", type=float, default=60.0, help="no further round after this (60)")
    add("--threads", type=int, help="threads of torch (all cores)")
    add("--quick", action="store_true", help="small sizes, some two minutes")
    add("--redraw", action="store_true", help="measure nothing; show the last run again")
    return made


if __name__ == "__main__":
    main()
