from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from gradcache_clip.train import config, config_data, config_loss, config_model
from gradcache_clip.train.backbones import build_image_backbone
from gradcache_clip.train.config_data import SMALLEST_VOCABULARY
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config, save_config
from gradcache_clip.train.programs import pairs, texts, views
from gradcache_clip.train.programs.pairs import PairsConfig
from gradcache_clip.train.tokenizer import train_tokenizer


def test_defaults_then_file_then_overrides(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  batch_size: 512\n  steps: 700\nmodel:\n  image_kwargs: {depth: 4}\n")
    found = load_config(path, ["train.steps=900", "model.text_kwargs={num_hidden_layers: 2}"])
    assert (found.train.batch_size, found.train.steps) == (512, 900)
    assert found.model.image_kwargs == {"depth": 4}
    assert found.model.text_kwargs == {"num_hidden_layers": 2}
    assert found.optimizer == PairsConfig().optimizer


def test_a_saved_config_loads_as_the_same(tmp_path: Path):
    found = load_config(None, ["data.vocab_size=500", "model.text_kwargs={a: [1, 2]}"])
    save_config(found, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == found


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
        ("optimizer.learning_rate=0", "optimizer.learning_rate: expected more than 0, got 0"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: expected a number, got 'nan'"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate: expected a number, got 'inf'"),
        ("optimizer.beta1=1", "optimizer.beta1: expected less than 1, got 1"),
        ("optimizer.beta2=-0.1", "optimizer.beta2: expected at least 0, got -0.1"),
        ("optimizer.eps=0", "optimizer.eps: expected more than 0, got 0"),
        (
            "optimizer.warmup_steps=1000",
            "optimizer.warmup_steps: .* less than the 1000 .* got 1000",
        ),
        ("train.ema_decay=1", "train.ema_decay: expected less than 1, got 1"),
        ("train.seed=-1", "train.seed: expected at least 0, got -1"),
        ("train.output=", "train.output: expected some text, got ''"),
        ("data.random_crop=0", "data.random_crop: expected more than 0, got 0"),
        ("data.vocab_size=258", "data.vocab_size: expected at least 259, got 258"),
        ("loss.init_logit_scale=0", "loss.init_logit_scale: expected more than 0, got 0"),
        (
            "loss.max_logit_scale=9",
            "loss.init_logit_scale: expected at most loss.max_logit_scale",
        ),
        ("loss.name=clop", "loss.name: expected one of clip, siglip, .*, got 'clop'"),
        ("loss.matryoshka=[64, 32]", r"loss.matryoshka: expected increasing .* got \[64, 32\]"),
        ("loss.matryoshka=[64]", "loss.matryoshka: .* feature width 256"),
        ("model.freeze=both", "model.freeze: expected one of , image, text, got 'both'"),
        ("model.text_pretrained=true", "data.tokenizer: .* got 'train'.* use data.tokenizer=bert"),
        ("evaluation.recall_at=[]", "evaluation.recall_at: expected positive integers"),
        ("train.batch_size", "override: expected section.key=value, got 'train.batch_size'"),
        ("train=3", "train: expected keys with values, got int"),
    ],
)
def test_mistakes_are_named(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=", "train.batch_size: expected an integer, got None; change it in"),
        ("train.batch_size=3.5", "train.batch_size: expected an integer, got 3.5; change it in"),
        ("train.batch_size=[1]", "train.batch_size: expected an integer, got [1]; change it in"),
        ("train.seed.x=1", "train.seed: expected an integer, got {'x': 1}; change it in"),
        ("optimizer.eps=tiny", "optimizer.eps: expected a number, got 'tiny'; change it in"),
        ("train.resume=maybe", "train.resume: expected true or false, got 'maybe'; change it in"),
        ("model.text_kwargs=3", "model.text_kwargs: expected a mapping such as {depth: 4}, got 3;"),
        ("evaluation.recall_at=[a]", "evaluation.recall_at: expected a list of integers such as"),
        (
            "data.allow_url_schemes=ftp",
            "data.allow_url_schemes: expected a list such as [a, b], go",
        ),
        ("model.image_kwargs={a: 1", "model.image_kwargs: expected a YAML value, got '{a: 1' ("),
        ("data.validation=${a.b}", "data.validation: expected ${section.key} to name a value of"),
        ("data.validation=${", "data.validation: expected ${section.key} to name a value of"),
        ("data.train=${data.train}", "data.train: expected ${section.key} to "),
        ("=3", "override: expected section.key=value, got '=3'"),
    ],
)
def test_values_of_the_wrong_kind_say_all_in_one_line(override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


ONE_MODEL = """
model:
  image: convnext_atto
  image_kwargs: {depths: [1, 1, 2, 1], dims: [32, 64, 128, 256]}
  text_kwargs: {hidden_size: 64, num_hidden_layers: 1}
"""


@pytest.mark.parametrize(
    ("overrides", "image_kwargs"),
    [
        (["model.image_kwargs={}"], {}),
        (["model.image_kwargs={patch_size: 2}"], {"patch_size": 2}),
        (["model={image_kwargs: {patch_size: 2}}"], {"patch_size": 2}),
        (
            ["model.image_kwargs={a: 1}", "model.image_kwargs.patch_size=2"],
            {"a": 1, "patch_size": 2},
        ),
        (["model.image=vit_tiny_patch16_224"], {}),
        (["model={image: vit_tiny_patch16_224}"], {}),
        (["model.image_kwargs={depth: 4}", "model.image=vit_tiny_patch16_224"], {"depth": 4}),
        (["model.image_kwargs.depth=4", "model.image=vit_tiny_patch16_224"], {"depth": 4}),
    ],
)
def test_arguments_of_a_model_are_replaced_and_go_with_it(
    tmp_path: Path, overrides: list[str], image_kwargs: dict[str, object]
):
    path = tmp_path / "config.yaml"
    path.write_text(ONE_MODEL)
    model = load_config(path, overrides).model
    assert model.image_kwargs == image_kwargs
    assert model.text_kwargs == {"hidden_size": 64, "num_hidden_layers": 1}


def test_arguments_stay_with_the_same_model(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(ONE_MODEL)
    same = load_config(path, ["model.image=convnext_atto", "model.text=bert"])
    assert same == load_config(path)
    one_more = load_config(path, ["model.image_kwargs.patch_size=2"]).model.image_kwargs
    assert one_more == same.model.image_kwargs | {"patch_size": 2}
    assert load_config(path, ["model.text=roberta"]).model.text_kwargs == {}


def test_the_command_of_the_readme_builds_its_model():
    demo = Path(__file__).parent.parent / "examples" / "demo.yaml"
    found = load_config(demo, ["model.image=vit_tiny_patch16_224", "train.batch_size=4096"])
    assert found.model.image_kwargs == {} and found.model.text_kwargs != {}
    assert build_image_backbone(found.model, image_size=32).num_features == 192


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.validation=", ""),
        ('data.validation=""', ""),
        ("data.validation=''", ""),
        ("data.validation='a b'", "a b"),
        ("data.validation={000..099}.tar", "{000..099}.tar"),
        ("data.validation=1e3", "1e3"),
        ("data.validation=${data.train}/held", "data/train/held"),
    ],
)
def test_text_is_taken_as_it_stands(tmp_path: Path, override: str, expected: str):
    path = tmp_path / "config.yaml"
    path.write_text("data: {train: data/train, validation: shards/validation}")
    assert load_config(path, [override]).data.validation == expected


def test_an_empty_value_in_a_file_is_the_empty_text(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  validation:\n")
    assert load_config(path).data.validation == ""


def test_chunks_of_one_have_no_negatives():
    with pytest.raises(ConfigError, match="a chunk of one sample has no negatives"):
        load_config(None, ["train.chunk_size=1", "train.grad_cache=false"])
    ragged = ["train.batch_size=65", "train.chunk_size=16"]
    with pytest.raises(ConfigError, match="got 65 in chunks of 16; use train.batch_size=64"):
        load_config(None, [*ragged, "train.grad_cache=false"])
    assert load_config(None, ragged).train.batch_size == 65


def test_the_smallest_vocabulary_is_the_tokenizers():
    smallest = train_tokenizer(["a"], vocab_size=SMALLEST_VOCABULARY)
    assert smallest.vocab_size == SMALLEST_VOCABULARY
    with pytest.raises(ValueError, match=f"at least {SMALLEST_VOCABULARY} "):
        train_tokenizer(["a"], vocab_size=SMALLEST_VOCABULARY - 1)


def test_checkpoints_are_written_on_the_way():
    assert PairsConfig().train.checkpoint_every == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected sections with keys, got list"),
        (
            "train:\n  steps: 1\n  device: [1\n",
            "expected YAML, got an error in line 4: .*expected",
        ),
        ("!!python/object:os.x {}", "expected YAML, got an error in line 1: could not determine"),
        ("data:\n  train: ${x\n", "expected YAML, got an error: "),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml: " + message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_dotted_key_belongs_on_the_command_line(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("train.steps: 5\n")
    with pytest.raises(ConfigError, match="nests its keys: write 'steps' indented below 'train:'"):
        load_config(path)


def test_a_directory_is_no_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"which is a directory; pass a file, .*config\.yaml"):
        load_config(tmp_path)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml, which does not exist"):
        load_config(tmp_path / "nowhere.yaml")


def test_every_field_has_a_docstring_under_it():
    modules = (config, config_data, config_loss, config_model, pairs, texts, views)
    sources = [inspect.getsource(module) for module in modules]
    nodes = [node for source in sources for node in ast.parse(source).body]
    for section in [node for node in nodes if isinstance(node, ast.ClassDef)]:
        for field, after in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{section.name}.{ast.unparse(field.target)}"
