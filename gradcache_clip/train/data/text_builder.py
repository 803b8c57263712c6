"""The Arrow copy of text files that `datasets` keeps in its cache; imported where it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets

from gradcache_clip.train.data.text_batches import batches_of


@dataclass
class TextConfig(datasets.BuilderConfig):
    """What a copy depends on, beside its files."""

    version: Any = "1.0.0"
    kind: str = ""


class TextBuilder(datasets.ArrowBasedBuilder):
    """Copies rows as they are: no file is unpacked, downloaded or run."""

    BUILDER_CONFIG_CLASS = TextConfig

    def _info(self) -> Any:
        return datasets.DatasetInfo()

    def _split_generators(self, _downloads: Any) -> list[Any]:
        names = [str(name) for name in self.config.data_files["train"]]
        return [datasets.SplitGenerator(name="train", gen_kwargs={"names": names})]

    def _generate_tables(self, names: list[str]) -> Iterator[tuple[Any, Any]]:
        yield from enumerate(batches_of(self.config.kind, names))


def table_of_copy(kind: str, names: list[str], cache_dir: str) -> Any:
    """The rows of files as a table in a mapped file, made where the cache has none."""
    builder = TextBuilder(cache_dir=cache_dir, data_files={"train": names}, kind=kind)
    builder.download_and_prepare()
    return builder.as_dataset(split="train").data
