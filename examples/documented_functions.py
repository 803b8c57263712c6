"""Pairs for the examples of text embedders, from the documentation of what is installed."""

import inspect

import numpy as np
import torch


def documented_functions() -> dict[str, str]:
    """Collect names of numpy and torch functions, sorted, and the line that describes each."""
    found = {}
    for module in (np, np.linalg, np.fft, torch, torch.nn.functional, torch.linalg):
        for name, function in inspect.getmembers(module, callable):
            lines = [line for line in (inspect.getdoc(function) or "").splitlines() if line]
            # The first line of many is their signature.
            sentence = next((line for line in lines[:3] if f"{name}(" not in line), "")
            if len(sentence.split()) > 3 and not name.startswith("_"):
                found[name.replace("_", " ")] = sentence
    return dict(sorted(found.items()))
