from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from gradcache_clip.train import config as config_module
from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.config_file import load_config, save_config


def test_defaults_then_file_then_overrides(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  batch_size: 512\n  steps: 7\nmodel:\n  image_kwargs: {depth: 4}\n")
    config = load_config(path, ["train.steps=9", "model.text_kwargs={num_hidden_layers: 2}"])
    assert (config.train.batch_size, config.train.steps) == (512, 9)
    assert config.model.image_kwargs == {"depth": 4}
    assert config.model.text_kwargs == {"num_hidden_layers": 2}
    assert config.optimizer == Config().optimizer


def test_a_saved_config_loads_as_the_same(tmp_path: Path):
    config = load_config(None, ["data.allow_url_schemes=[https]", "model.text_kwargs={a: [1, 2]}"])
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.bach_size=3", "train.bach_size: no such key; did you mean train.batch_size"),
        ("trian.batch_size=3", "trian: no such key; did you mean train"),
        ("batch_size=3", "batch_size: no such key; did you mean train.batch_size"),
        ("train.zzzzzz=3", "train.zzzzzz: no such key; keys are output, "),
        ("train.batch_size=many", "train.batch_size: .*many"),
        ("train.batch_size=1", "train.batch_size: expected at least 2, got 1"),
        ("train.chunk_size=0", "train.chunk_size: expected at least 1, got 0"),
        ("train.precision=int8", "train.precision: expected one of fp32, bf16, fp16, got 'int8'"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: expected more than 0, got 0.0"),
        ("optimizer.beta1=1.5", "optimizer.beta1: expected a number from 0 to 1"),
        ("evaluation.recall_at=[]", "evaluation.recall_at: expected positive integers"),
        ("train.batch_size", "override: expected section.key=value, got 'train.batch_size'"),
        ("train=3", "train: expected sections with keys, got int"),
    ],
)
def test_mistakes_are_named(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_chunks_of_one_have_no_negatives():
    with pytest.raises(ConfigError, match="a chunk of one pair has no negatives"):
        load_config(None, ["train.chunk_size=1", "train.negatives=chunk"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "!!python/object:os.x {}"])
def test_files_that_are_no_config(tmp_path: Path, text: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(path)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml, which does not exist"):
        load_config(tmp_path / "nowhere.yaml")


def test_every_field_has_a_docstring_under_it():
    tree = ast.parse(inspect.getsource(config_module))
    for section in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        for field, after in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{section.name}.{ast.unparse(field.target)}"
