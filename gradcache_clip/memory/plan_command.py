"""The `plan` command: options and output."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradcache_clip.memory.plan_options import OPTIMIZER_STATES, PRECISIONS, Plan, PlanOptions

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PlanOptions)}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`: two models or a configuration, a card, and the step."""
    parser.add_argument("config", nargs="?", type=Path, help="YAML file of the train command")
    parser.add_argument(
        "overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="changes to that file"
    )
    parser.add_argument("--image", metavar="NAME", help="a timm model")
    parser.add_argument(
        "--text", metavar="NAME", help="bert-base, another published name, or a transformers type"
    )
    parser.add_argument(
        "--gpu", required=True, metavar="CARD", help="'RTX 4090', or 24GB for any other card"
    )
    _add_step_options(parser)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="gets plan.png and plan.svg")
    parser.add_argument("--json", action="store_true", help="print numbers instead of tables")
    parser.set_defaults(run=run_plan)


def _add_step_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of `PlanOptions`, which has the defaults."""
    sizes = {
        "batch_size": "pairs per step, over all processes",
        "chunk_size": "pairs through a tower at once",
        "world_size": "processes, one per card",
        "image_size": "height and width in pixels",
        "context_length": "tokens per text",
        "feature_dim": "width of the features",
    }
    for name, text in sizes.items():
        default = _DEFAULTS[name] or "the model's own"
        parser.add_argument(_flag(name), type=int, metavar="N", help=f"{text} ({default})")
    for name in ("image_trainable", "text_trainable"):
        text = "share of the model to train, counted from its end (1)"
        parser.add_argument(_flag(name), type=float, metavar="SHARE", help=text)
    parser.add_argument("--precision", choices=PRECISIONS, help="bf16")
    parser.add_argument("--optimizer", choices=list(OPTIMIZER_STATES), help="adamw")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="ZeRO stage (0)")
    places = "device", "host"
    parser.add_argument("--batch-device", choices=places, help="where the batch is stored")
    for name in ("checkpointing", "ema"):
        parser.add_argument(_flag(name), action="store_const", const=True)
    parser.add_argument("--memory-budget", metavar="SIZE", help="for kept graphs: 8GB, auto")
    parser.add_argument(
        "--context-memory", metavar="SIZE", help="used outside of the allocator (512MB)"
    )


def run_plan(arguments: argparse.Namespace) -> int:
    """Plan, print and draw; returns status 0 if the step fits, 1 if not."""
    plan = _plan(arguments)
    if arguments.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        from gradcache_clip.memory.plan_table import show_plan

        show_plan(plan)
    if arguments.output is not None:
        _draw(plan, arguments.output, quiet=arguments.json)
    return 0 if plan.fits else 1


def _plan(arguments: argparse.Namespace) -> Plan:
    from gradcache_clip.memory.plan_named import plan
    from gradcache_clip.memory.planner import options_of, plan_config
    from gradcache_clip.train.config_file import load_config

    given = _given(arguments)
    named = arguments.image is not None and arguments.text is not None
    if named == (arguments.config is not None):
        raise ValueError(
            "plan: expected either a configuration or both --image and --text, got "
            f"{'both' if named else 'neither'}; such as --image vit_base_patch16_224 "
            "--text bert-base"
        )
    if named:
        return plan(arguments.image, arguments.text, arguments.gpu, PlanOptions(**given))
    _refuse_sizes_of_models(given)
    config = load_config(arguments.config, arguments.overrides)
    return plan_config(config, arguments.gpu, dataclasses.replace(options_of(config), **given))


def _refuse_sizes_of_models(given: Mapping[str, Any]) -> None:
    """Raise ValueError for options that a configuration already determines."""
    keys = {
        "image_size": "data.image_size",
        "context_length": "data.context_length",
        "feature_dim": "model.feature_dim",
    }
    for name, key in keys.items():
        if name in given:
            raise ValueError(
                f"{_flag(name)}: expected no such option with a configuration, got "
                f"{given[name]}; pass {key}={given[name]}"
            )


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    from gradcache_clip.memory.cards import parse_bytes

    given = {name: getattr(arguments, name, None) for name in _DEFAULTS}
    if arguments.context_memory is not None:
        given["context_bytes"] = parse_bytes(arguments.context_memory, "context_memory")
    return {name: value for name, value in given.items() if value is not None}


def _draw(plan: Plan, folder: Path, *, quiet: bool) -> None:
    from gradcache_clip.memory.plan_picture import draw_plan

    for path in draw_plan(plan, folder):
        if not quiet:
            print(f"drawn: {path}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
