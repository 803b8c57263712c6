"""`gradcache-clip launch`: start a training run on several processes with torchrun."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping

from gradcache_clip.train.command import INTERRUPTED, CommandError, add_train_arguments

_PR_SET_PDEATHSIG, _INIT = 1, 1

SAVING_S = 300
"""Seconds that processes have after Ctrl-C to finish their step and write a checkpoint."""


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `launch`, and the command that the processes run."""
    parser.add_argument("--nproc", type=int, help="processes on this machine (default: its GPUs)")
    parser.add_argument("--nnodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--node-rank", type=int, default=0, help="which of the machines this is")
    parser.add_argument("--master-addr", help="address of machine 0, needed with several")
    parser.add_argument("--master-port", type=int, default=29500, help="a free port of machine 0")
    parser.add_argument(
        "--strategy", choices=("ddp", "fsdp", "deepspeed"), help="distributed.strategy"
    )
    parser.add_argument("--zero", type=int, choices=range(4), help="distributed.zero")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a CLIP model from shards")
    add_train_arguments(train)
    train.set_defaults(run=run_launch)


def run_launch(arguments: argparse.Namespace) -> int:
    """Start the processes, wait for them, and return the exit status of the run.

    Raises:
        CommandError: an impossible number of processes or machines.
        ConfigError: the configuration cannot be run; no process was started.
    """
    from gradcache_clip.train.config_file import load_config
    from gradcache_clip.train.deepspeed_config import deepspeed_settings
    from gradcache_clip.train.peers import rows_per_process

    processes = _processes_here(arguments)
    _check_machines(arguments)
    overrides = [*arguments.overrides, *_strategy_overrides(arguments)]
    # Check here, so that a mistake is reported once and not by every process.
    config = load_config(arguments.config, overrides)
    rows_per_process(config.train.batch_size, processes * arguments.nnodes)
    if config.distributed.strategy == "deepspeed":
        deepspeed_settings(config, processes * arguments.nnodes)
    command = ["-m", "gradcache_clip.train", str(arguments.config), *overrides]
    if getattr(arguments, "traceback", False):
        command.append("--traceback")
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads_of_a_process(processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_S))
    return _torchrun([*_torchrun_options(arguments, processes), *command])


def end_with_launcher() -> None:
    """Let this process get SIGTERM when the launcher that started it dies, even by SIGKILL.

    It then ends as on any SIGTERM, after its step and with a checkpoint. Linux alone can do so.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() == _INIT:
        # It died before that.
        os.kill(os.getpid(), signal.SIGTERM)


def _processes_here(arguments: argparse.Namespace) -> int:
    import torch

    processes = torch.cuda.device_count() if arguments.nproc is None else arguments.nproc
    if processes < 1:
        got = "none, and there is no GPU here" if arguments.nproc is None else str(processes)
        raise CommandError(
            f"--nproc: expected a number of processes of at least 1, got {got}; pass e.g. --nproc 2"
        )
    return int(processes)


def _check_machines(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.node_rank < arguments.nnodes:
        raise CommandError(
            f"--node-rank: expected 0 to {arguments.nnodes - 1} with --nnodes {arguments.nnodes}, "
            f"got {arguments.node_rank}; number the machines from 0"
        )
    if arguments.nnodes > 1 and arguments.master_addr is None:
        raise CommandError(
            f"--master-addr: expected the address of machine 0 with --nnodes {arguments.nnodes}, "
            "got none; pass the same on all machines"
        )


def _strategy_overrides(arguments: argparse.Namespace) -> list[str]:
    given = {"strategy": arguments.strategy, "zero": arguments.zero}
    return [f"distributed.{key}={value}" for key, value in given.items() if value is not None]


def _threads_of_a_process(processes: int) -> int:
    """Share the cores among the processes, which would otherwise oversubscribe them."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // processes)


def _torchrun_options(arguments: argparse.Namespace, processes: int) -> list[str]:
    """Return torchrun's options; on one machine it finds a free port by itself."""
    if arguments.nnodes == 1:
        return ["--standalone", f"--nproc-per-node={processes}"]
    return [
        f"--nproc-per-node={processes}",
        f"--nnodes={arguments.nnodes}",
        f"--node-rank={arguments.node_rank}",
        f"--master-addr={arguments.master_addr}",
        f"--master-port={arguments.master_port}",
    ]


def _torchrun(command: list[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(command))
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        return _failed({rank: failure.exitcode for rank, failure in error.failures.items()})
    return 0


def _failed(statuses: Mapping[int, int]) -> int:
    """Return the exit status after failures; print those of killed processes, which are mute."""
    if set(statuses.values()) <= {INTERRUPTED, -signal.SIGTERM}:
        return INTERRUPTED
    killed = {rank: -n for rank, n in statuses.items() if n < 0 and n != -signal.SIGTERM}
    for rank, number in killed.items():
        name = signal.Signals(number).name
        print(f"gradcache-clip launch: rank {rank} was ended by {name}", file=sys.stderr)
    return max([1, *(status for status in statuses.values() if status > 0)])
