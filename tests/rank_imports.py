"""What ranks need, imported once, by the server that they fork from."""

from __future__ import annotations

import atexit
import gc
import importlib.util

import pytest  # noqa: F401
import timm  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp
import torch.utils.tensorboard  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import gradcache_clip.train.run  # noqa: F401

if importlib.util.find_spec("deepspeed"):
    # Each rank would compile and load sums over shared memory; without them gloo adds up.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    # With torch.compile's back ends, which each engine of ZeRO would load.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")

# No rank collects, or copies page by page, what all of them share.
gc.freeze()
atexit.register(gc.unfreeze)
