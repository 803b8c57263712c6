"""The command line that the makers of demo data share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def maker_parser(description: str | None, validation_share: float) -> argparse.ArgumentParser:
    """OUT, --validation-share and --seed; a script adds options of its own."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder that gets the training and validation data")
    add(
        "--validation-share",
        type=float,
        default=validation_share,
        help="share to hold out (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the split and the order (default: %(default)s)")
    return parser


def run_maker(
    make: Callable[..., object], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Call `make` with the parsed options, print its summary, and return the exit status.

    A wrong setting or a failed download ends with one line on stderr and status 2.
    """
    options = parser.parse_args(argv)
    try:
        print(make(**vars(options)))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0
