"""Held-out texts: recall by width, pictures, and the tower taken along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recipe_runs import recipe, shortened
from rich.console import Console
from text_files import make_texts, write_lines
from text_runs import SMALL, run_small
from trainer_step import trainer_of

from gradcache_clip.cli import main
from gradcache_clip.train import run as training
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config, save_config
from gradcache_clip.train.evaluate import evaluate_run
from gradcache_clip.train.evaluation.embed import EmbedOptions
from gradcache_clip.train.evaluation.held_out_texts import HeldOutTexts, embed_held_out_texts
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.run_folder import RunFolder
from gradcache_clip.train.run_pictures import draw_run, run_curve
from gradcache_clip.train.state import load_trained


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("texts"))


def held_out() -> HeldOutTexts:
    """Two queries of three documents; the second is right by its first two numbers alone."""
    queries = torch.tensor([[3.0, 0, 0, 0], [0, 1, 0, 5]])
    documents = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 2]])
    texts = ["a long question " * 20, "b"], ["one", "two " * 40, "three"]
    return HeldOutTexts(queries, documents, *texts, torch.tensor([0, 1]), (2,), (1, 2))


def test_recall_is_by_cosine_of_each_width():
    scalars = held_out().scalars()
    assert scalars["query_to_document_recall_at_1"] == 0.5
    assert scalars["query_to_document_recall_at_2"] == 1.0
    assert scalars["query_to_document_recall_at_1_of_2_numbers"] == 1.0
    assert scalars["query_to_document_recall_at_1_chance"] == pytest.approx(1 / 3)
    assert scalars["query_to_document_mean_rank"] == 1.5


class Lengths(torch.nn.Module):
    """Embeds texts by their length; documents point elsewhere than queries."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, tower: int, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.weight * torch.stack([tokens["length"], tokens["length"] * 0 + tower], 1)


def test_texts_are_embedded_in_order_and_equal_documents_once():
    rows = [("aaaa", "dot"), ("a", "a hook"), ("aaa", "dot"), ("aa", "x")]
    found = embed_held_out_texts(
        Lengths(),
        lambda texts: {"length": torch.tensor([float(len(text)) for text in texts])},
        iter(rows),
        EmbedOptions(batch_size=3),
        widths=(1,),
        recall_at=(1,),
    )
    assert found is not None and found.documents == ["dot", "a hook", "x"]
    assert found.queries == ["aaaa", "a", "aaa", "aa"] and found.query_ids.tolist() == [0, 1, 0, 2]
    assert found.query_features.tolist() == [[4, 0], [1, 0], [3, 0], [2, 0]]
    assert found.document_features.tolist() == [[3, 1], [6, 1], [1, 1]]
    assert found.scalars()["query_to_document_recall_at_1_chance"] == pytest.approx(1 / 3)
    assert [*found.metrics().by_width] == [2, 1]


def test_evaluate_prints_a_row_for_each_width(tmp_path, capsys):
    data = make_texts(tmp_path / "texts")
    summary = run_small(data, tmp_path / "run", "train.steps=2")
    found = evaluate_run(tmp_path / "run", device="cpu")
    assert found.to_scalars() == summary.metrics
    out = capsys.readouterr().out
    assert all(f"first {width}" in out for width in (16, 8, 4))
    # Negatives are for training: held-out lines need none.
    other = write_lines(
        tmp_path / "other.jsonl",
        ({"anchor": "a b", "positive": "c"}, {"anchor": "d", "positive": "e"}),
    )
    (tmp_path / "texts" / "train").rename(tmp_path / "gone")
    pairs = evaluate_run(tmp_path / "run", device="cpu", data=str(other)).to_scalars()
    assert pairs["query_to_document_recall_at_1_chance"] == pytest.approx(1 / 2)
    with pytest.raises(ConfigError, match="templates: expected none"):
        evaluate_run(tmp_path / "run", templates=("a {}",))


def pretrained(model: Path, *more: str) -> tuple[str, ...]:
    """Settings for the tower of sentence-transformers in a folder."""
    sizes = "model.text_kwargs={}", "loss.matryoshka=[8,32]"
    source = f"data.tokenizer={model}", f"model.text={model}", "model.text_pretrained=true"
    return *source, *sizes, *more


def test_a_pretrained_tower_says_what_sentence_transformers_says(data, tmp_path):
    pytest.importorskip("sentence_transformers")
    from tiny_sentences import sentences, tiny_model

    theirs, texts = tiny_model(tmp_path / "model"), sentences(9, 20, seed=3)
    settings = shortened(data, tmp_path / "run", *SMALL, *pretrained(tmp_path / "model"))
    trainer = trainer_of(recipe("text_embedding"), settings, tmp_path / "new")
    assert trainer.tokenizer is not None
    with torch.no_grad():
        found = trainer.encoder.float().eval()(2, trainer.tokenizer(texts))
    torch.testing.assert_close(found, torch.tensor(theirs.encode(texts)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_an_exported_tower_is_the_trained_one(data, tmp_path, capsys, pool):
    """Also when the folder of weights that training began with is gone."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from tiny_sentences import sentences, tiny_model

    tiny_model(tmp_path / "model")
    prompts = ("seek: ", "keep: ")
    more = pretrained(
        tmp_path / "model", f"model.text_pool={pool}", f"data.text_prompts={[*prompts]}"
    )
    run_small(data, tmp_path / "run", *more)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    command = ["export", str(tmp_path / "run"), str(tmp_path / "new" / "out")]
    assert main(command) == 0 and str(tmp_path / "new" / "out") in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    path, texts = str(tmp_path / "new" / "out"), sentences(9, 20, seed=3)
    exported = sentence_transformers.SentenceTransformer(path, device="cpu")
    # Weights that nobody trained would be drawn at random.
    assert not [name for name, _ in exported.named_parameters() if "pooler" in name]
    run = RunFolder(tmp_path / "run")
    program = program_of(load_config(run.config))
    encoder, tokenizer, _ = load_trained(program, run)
    assert tokenizer is not None and exported.max_seq_length == 24
    for prompt, encode in zip(
        prompts, (exported.encode_query, exported.encode_document), strict=True
    ):
        with torch.no_grad():
            trained = encoder.eval()(0, tokenizer([prompt + text for text in texts]))
        said = torch.tensor(encode(texts))
        torch.testing.assert_close(said, F.normalize(trained, dim=1), atol=1e-6, rtol=1e-5)
    held_out = program.evaluate(encoder, tokenizer, Peers())
    assert isinstance(held_out, HeldOutTexts)
    for prompt, shown in zip(prompts, (held_out.queries, held_out.documents), strict=True):
        assert all(text.startswith(prompt) and text != prompt for text in shown)
    evaluated = evaluate_run(tmp_path / "run", device="cpu").to_scalars()
    assert evaluated == json.loads(run.summary.read_text())["metrics"]
    assert main(command) == 2
    assert "out: expected a new or empty folder" in capsys.readouterr().err


def test_what_cannot_be_exported(data, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    save_config(load_config(), tmp_path / "images" / "config.yaml")
    assert main(["export", str(tmp_path / "images"), str(tmp_path / "out")]) == 2
    assert "run: expected a run with program: texts" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_pictures(data, tmp_path):
    config = load_config(recipe("text_embedding"), shortened(data, tmp_path / "run", *SMALL))
    training.train(config, console=Console(quiet=True))
    run = RunFolder(tmp_path / "run")
    assert {path.name for path in run.pictures.iterdir()} == {"curves.png", "gallery.png"}
    for path in run.pictures.iterdir():
        assert path.stat().st_size > 10_000
    curve = run_curve(run, config)
    assert curve.candidates == 2 * 24
    assert curve.chance_loss == pytest.approx(3 * torch.tensor(48.0).log().item(), rel=1e-6)
    assert len(draw_run(run, program_of(config), None, None)) == 1
