"""Seeds, saves and restores every random generator of a run, without pickled objects."""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch


def seed_rng(seed: int) -> None:
    """Seed every generator that `capture_rng` captures: nothing else decides what a run draws.

    Args:
        seed: 0 or more; NumPy takes its lower 32 bits.

    Example:
        >>> import random
        >>> seed_rng(3)
        >>> first = random.random()
        >>> seed_rng(3)
        >>> random.random() == first
        True
    """
    import numpy

    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def capture_rng() -> dict[str, Any]:
    """Capture the state of torch's CPU and CUDA generators, and NumPy's and Python's global ones.

    The result consists of tensors, numbers, strings and lists, so `torch.load(weights_only=True)`
    reads it. CUDA generators are captured only if this process has initialised CUDA.

    Returns:
        A dict for `restore_rng`: {"torch": uint8 tensor, "cuda": list of uint8 tensors, one per
        device, "numpy": dict, "python": dict}.

    Raises:
        ValueError: NumPy's global generator was replaced by another kind than MT19937.

    Example:
        >>> state = capture_rng()
        >>> first = torch.rand(())
        >>> restore_rng(state)
        >>> bool(torch.rand(()) == first)
        True
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": _capture_numpy(),
        "python": _capture_python(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Restore every generator to the state that `capture_rng` returned, bit for bit.

    Args:
        state: result of `capture_rng`, on the CPU.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: it is something else.

    Warns:
        RuntimeWarning: the state was captured with more CUDA devices than this machine has.
    """
    _restore_numpy(state["numpy"])
    _restore_python(state["python"])
    torch.set_rng_state(state["torch"])
    _restore_cuda(state["cuda"])


def _restore_cuda(states: list[torch.Tensor]) -> None:
    here = torch.cuda.device_count()
    if len(states) > here:
        warnings.warn(
            f"random state: saved with {len(states)} CUDA devices, found {here}; draws on the "
            "missing devices will differ from those of a run that never stopped",
            RuntimeWarning,
            stacklevel=3,
        )
    for device, device_state in enumerate(states[:here]):
        torch.cuda.set_rng_state(device_state, device)


def _capture_numpy() -> dict[str, Any]:
    import numpy

    state = numpy.random.get_state(legacy=False)
    assert isinstance(state, dict)
    if state["bit_generator"] != "MT19937":
        raise ValueError(
            f"numpy.random: expected the MT19937 generator, got {state['bit_generator']}; "
            "undo numpy.random.set_bit_generator, or draw from a numpy.random.Generator of your own"
        )
    return {
        "key": torch.tensor(state["state"]["key"].tolist()),
        "position": int(state["state"]["pos"]),
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }


def _restore_numpy(state: dict[str, Any]) -> None:
    import numpy

    if not (state["key"].shape == (624,) and 0 <= state["position"] <= 624):
        # NumPy would read past its key.
        raise ValueError(
            f"numpy: expected 624 words and a position among them, got {len(state['key'])} and "
            f"{state['position']}"
        )
    key = numpy.array(state["key"].tolist(), dtype=numpy.uint32)
    numpy.random.set_state(("MT19937", key, state["position"], state["has_gauss"], state["gauss"]))


def _capture_python() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    return {"version": version, "words": torch.tensor(words), "gauss": gauss}


def _restore_python(state: dict[str, Any]) -> None:
    if not isinstance(state["gauss"], float | None):
        raise ValueError(f"python: expected a number or None as gauss, got {state['gauss']!r}")
    random.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))
