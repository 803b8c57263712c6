"""The command line: gradcache-clip train | launch | evaluate | plan | verify | export | data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gradcache_clip import __version__
from gradcache_clip.memory.plan_command import add_plan_arguments
from gradcache_clip.train.command import (
    add_traceback_option,
    add_train_arguments,
    end,
    run_command,
)
from gradcache_clip.train.launch import add_launch_arguments

if TYPE_CHECKING:
    from gradcache_clip.train.sources import CocoSplits, TableColumns


_DEMO_KINDS = ("emoji", "glyphs", "wordnet")
_SOURCES = {
    "folder": "the folder to read",
    "csv": "the table to read",
    "coco": "captions_train2017.json, dataset_coco.json or a file like them",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        for kind in _DEMO_KINDS:
            if f"invalid choice: '{kind}'" in message:
                message += f"; in a checkout, run `python examples/data/{kind}.py OUT`"
        super().error(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; user errors print one line on stderr and return status 2."""
    return run_command(_parser().parse_args(argv), name="gradcache-clip")


def command() -> NoReturn:
    """Run one command as a process of its own."""
    end(main())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gradcache-clip",
        description="Exact large-batch contrastive training in the memory of one chunk.",
    )
    parser.add_argument("--version", action="version", version=f"gradcache-clip {__version__}")
    add_traceback_option(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train_arguments(
        commands.add_parser("train", help="train a model from shards, or from lines of text")
    )
    launch = commands.add_parser(
        "launch",
        help="train on several processes",
        description="Start a run on several processes, which share the batch, with torchrun.",
    )
    add_launch_arguments(launch)
    _add_evaluate(commands)
    plan = commands.add_parser("plan", help="will these models and this batch fit a card?")
    add_plan_arguments(plan)
    add_traceback_option(plan)
    _add_verify(commands)
    _add_export(commands)
    _add_data(commands)
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="held-out retrieval of a trained run")
    evaluate.add_argument("run_folder", type=Path, metavar="RUN", help="train.output of the run")
    evaluate.add_argument("--data", help="data to use instead of the run's data.validation")
    evaluate.add_argument(
        "--zero-shot",
        action="append",
        metavar="TEMPLATE",
        help="also classify images zero-shot by their captions in TEMPLATE, such as "
        "'a photo of a {}.' (may be repeated)",
    )
    evaluate.add_argument(
        "--folds",
        type=int,
        help="number of consecutive parts of the images to average over (COCO 1K: 5)",
    )
    evaluate.add_argument(
        "--allow-url-scheme",
        action="append",
        metavar="SCHEME",
        help="open data by URLs of this scheme, such as https (may be given several times)",
    )
    evaluate.add_argument("--device", help="auto (default), cpu, cuda:1")
    add_traceback_option(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="is gradient caching exact for these towers?",
        description="Compare the gradients of a cached step with those of a plain one on a batch "
        "of the run's data, and explain differences. Status 0: exact, 1: not.",
    )
    verify.add_argument("config", type=Path, help="YAML file, or the train.output of a run")
    verify.add_argument(
        "overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="such as train.precision=bf16"
    )
    verify.add_argument("--rows", type=int, default=64, help="pairs in the batch (default 64)")
    add_traceback_option(verify)
    verify.set_defaults(run=_verify)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a trained text encoder for sentence-transformers",
        description="Write the text encoder of a run over texts as a folder that "
        "SentenceTransformer(OUT) loads.",
    )
    export.add_argument("run_folder", type=Path, metavar="RUN", help="train.output of the run")
    export.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    add_traceback_option(export)
    export.set_defaults(run=_export)


def _add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="make shards of images and captions",
        epilog=f"Demo data ({', '.join(_DEMO_KINDS)}): python examples/data/KIND.py OUT, "
        "in a checkout.",
    )
    kinds = data.add_subparsers(required=True, metavar="KIND")
    for kind, text in (
        ("folder", "images with a .txt of captions beside each"),
        ("csv", "a .csv, .tsv or .jsonl that lists images and captions"),
        ("coco", "COCO captions, or a JSON file with the splits of Karpathy"),
    ):
        parser = kinds.add_parser(kind, help=text)
        parser.add_argument("source", type=Path, help=_SOURCES[kind])
        if kind == "coco":
            _add_coco_arguments(parser)
        parser.add_argument("out", type=Path, metavar="OUT", help="gets train/ and validation/")
        parser.add_argument("--validation-share", type=float, help="share of pairs to hold out")
        parser.add_argument("--seed", type=int, default=0, help="of the split and the order")
        if kind == "csv":
            parser.add_argument("--image-column", help="column with paths of images")
            parser.add_argument("--caption-column", action="append", help="column with captions")
        add_traceback_option(parser)
        parser.set_defaults(run=_data, kind=kind)


def _add_coco_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of the images")
    for folder in ("train", "validation", "test"):
        parser.add_argument(
            f"--{folder}-split",
            action="append",
            metavar="NAME",
            help=f"split of the file to write to OUT/{folder} (may be repeated)",
        )


def _evaluate(arguments: argparse.Namespace) -> int:
    from gradcache_clip.train.evaluate import evaluate_run

    evaluate_run(
        arguments.run_folder,
        data=arguments.data,
        templates=tuple(arguments.zero_shot or ()),
        device=arguments.device,
        folds=arguments.folds,
        allow_url_schemes=tuple(arguments.allow_url_scheme or ()),
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from gradcache_clip.train.verify import verify_run

    report = verify_run(arguments.config, arguments.overrides, rows=arguments.rows)
    return 0 if report.exact else 1


def _export(arguments: argparse.Namespace) -> int:
    from gradcache_clip.train.export import export_run

    print(export_run(arguments.run_folder, arguments.out))
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from gradcache_clip.train import sources

    options: dict[str, Any] = {"seed": arguments.seed}
    if arguments.validation_share is not None:
        options["validation_share"] = arguments.validation_share
    if arguments.kind == "folder":
        summary = sources.make_folder(arguments.source, arguments.out, **options)
    elif arguments.kind == "csv":
        columns = _columns(arguments)
        summary = sources.make_table(arguments.source, arguments.out, columns=columns, **options)
    else:
        options["splits"] = _splits(arguments)
        summary = sources.make_coco(arguments.source, arguments.images, arguments.out, **options)
    print(summary)
    return 0


def _splits(arguments: argparse.Namespace) -> CocoSplits | None:
    """Return the given splits, with the usual names for the others; None if none is given."""
    from gradcache_clip.train.sources import CocoSplits

    folders = ("train", "validation", "test")
    given = {name: getattr(arguments, f"{name}_split") for name in folders}
    named = {name: tuple(names) for name, names in given.items() if names}
    return CocoSplits(**named) if named else None


def _columns(arguments: argparse.Namespace) -> TableColumns:
    from gradcache_clip.train.sources import TableColumns

    defaults = TableColumns()
    return TableColumns(
        image=arguments.image_column or defaults.image,
        captions=tuple(arguments.caption_column or defaults.captions),
    )


if __name__ == "__main__":
    command()
