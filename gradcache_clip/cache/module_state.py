"""Put modules in eval mode for a while, and undo what a forward leaves behind in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules and their parts in eval mode, one by one: `eval()` may be overridden."""
    parts = [part for module in modules for part in module.modules() if part.training]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True


@contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back attributes of modules and the values of their buffers."""
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    tables = [table for part in parts for table in (vars(part), part._buffers)]
    before = [(table, dict(table)) for table in tables]
    buffers = [b for part in parts for b in part._buffers.values() if b is not None]
    values = [(buffer, buffer._version, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for table, entries in before:
            for name in table.keys() - entries.keys():
                del table[name]
            table.update(entries)
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)
