"""GPUs by name, from cards.json, or by an amount of memory."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_FILE = Path(__file__).with_name("cards.json")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Capabilities of data-centre cards: A100, H100, B200.
_LARGE_WORKSPACE = (80, 90, 100)


@dataclass(frozen=True)
class Card:
    """Memory and speeds of a GPU, for a plan."""

    name: str
    memory_bytes: int
    """Total memory, as nvidia-smi shows it."""
    bandwidth_gb_per_s: float | None = None
    """Memory bandwidth, in 10^9 bytes per second."""
    capability: int = 80
    """10 times CUDA's compute capability."""
    tflops: tuple[tuple[str, float], ...] = ()
    """Dense matrix rates in 10^12 flops per second, by "fp32", "tf32", "bf16", "fp16"."""
    source: str = "given by its memory"

    def rate(self, precision: str) -> float | None:
        """Return flops per second of matrix products; None if no data sheet gives them."""
        rates = dict(self.tflops)
        return rates[precision] * 1e12 if precision in rates else None

    @property
    def large_workspace(self) -> bool:
        """Whether the loss kernels use the larger of their two workspaces."""
        return self.capability in _LARGE_WORKSPACE


def find_card(name: str) -> Card:
    """Find a card by name in any spelling, or describe one by its memory.

    Args:
        name: such as "RTX 4090", "nvidia geforce rtx 4090", "A100-80GB", or "24GB" for any other
            card (GB means GiB here, as in the names of cards).

    Raises:
        ValueError: no such card; the error names the nearest.

    Example:
        >>> find_card("rtx4090").name, find_card("24GB").memory_bytes == 24 * 2**30
        ('RTX 4090', True)
    """
    memory = re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]i?B?\s*", name, flags=re.IGNORECASE)
    if memory:
        return Card(name.strip(), parse_bytes(name, "gpu"))
    known, wanted = {_plain(card.name): card for card in cards()}, _plain(name)
    if wanted in known:
        return known[wanted]
    matches = [card for plain, card in known.items() if _is_same(wanted, plain)]
    if len(matches) == 1:
        return matches[0]
    near = [card.name for card in matches] or _nearest(wanted, known)
    raise ValueError(
        f"gpu: expected a known card or an amount of memory, got {name!r}; did you mean "
        f"{' or '.join(map(repr, near))}? For any other card pass an amount such as 24GB"
    )


@lru_cache(maxsize=1)
def cards() -> tuple[Card, ...]:
    """Read all cards of the data file."""
    return tuple(
        Card(
            name=each["name"],
            memory_bytes=each["memory_mib"] * 2**20,
            bandwidth_gb_per_s=each["bandwidth_gb_per_s"],
            capability=each["capability"],
            tflops=tuple(each["tflops"].items()),
            source=each["source"],
        )
        for each in json.loads(_FILE.read_text(encoding="utf-8"))["cards"]
    )


def parse_bytes(text: str, name: str) -> int:
    """Parse "8GB", "512 MiB" or "1000" to bytes; units are powers of 1,024.

    Raises:
        ValueError: not an amount of memory.

    Example:
        >>> parse_bytes("1.5GiB", "memory_budget")
        1610612736
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"{name}: expected an amount of memory, got {text!r}; pass e.g. 24GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _is_same(wanted: str, known: str) -> bool:
    """Match names that leave out RTX, or the only memory size or form factor of a card."""
    return bool(re.fullmatch(rf"(rtx)?{re.escape(wanted)}(\d+gb|sxm|pcie)?", known))


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|gpu|[^a-z0-9]", "", name.lower())


def _nearest(wanted: str, known: dict[str, Card]) -> list[str]:
    longer = [plain for plain in known if wanted and plain.startswith(wanted)]
    near = longer or difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    return [known[plain].name for plain in near] or [card.name for card in known.values()][:3]
