"""Faults at random moments: a run ends with a word and no traceback, and is resumed exactly."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_runs import SETTINGS, STEPS, Case, ended, in_step, reference
from tiny_run import overrides

# Faults of each kind where nobody asks for more with --faults.
FEW = 1
Inject = Callable[[Case], bool]
"""Hurts a run; returns whether it ended as it should."""


def _kill(case: Case, *more: str, prepare: Any = None) -> bool:
    (process,) = case.start(*more, prepare=prepare)
    case.moment()
    process.kill()
    process.join()
    return True


def _slow_saves(_rank: int) -> None:
    original = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(0.02)
        original(descriptor)

    os.fsync = fsync


def _signalled(case: Case, number: int, *more: str, group: bool = False) -> bool:
    (process,) = case.start(*more, prepare=_own_group)
    case.moment()
    assert process.pid is not None
    if process.is_alive():
        (os.killpg if group and os.getpgid(process.pid) == process.pid else os.kill)(
            process.pid, number
        )
    # Outside of the loop SIGTERM does what it does everywhere.
    expected = (0, 130) if number == signal.SIGINT else (0, 130, -number)
    return ended(process) in expected and case.kept_quiet()


def _own_group(_rank: int) -> None:
    os.setpgid(0, 0)


def _worker(case: Case, number: int) -> bool:
    hurt = in_step(case.draw.randint(1, STEPS - 4), partial(_hurt_a_worker, number))
    start = time.monotonic()
    status = case.run("data.workers=2", "distributed.timeout_s=4", prepare=hurt)
    (line,) = [line for line in case.last_words().splitlines() if "data.workers" in line]
    words = "is stopped" if number == signal.SIGSTOP else "ended by SIGKILL"
    return status == 2 and words in line and case.kept_quiet() and time.monotonic() - start < 30


def _hurt_a_worker(number: int) -> None:
    psutil.Process().children()[0].send_signal(number)


def _fails(number: int, allowed: int, _rank: int) -> None:
    """From some operation on, the file system refuses to write."""
    import tempfile

    import safetensors.torch

    from gradcache_clip.train.report.metrics_log import MetricsLog

    done = iter(range(allowed))

    def limited(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(done, None) is None:
                raise OSError(number, os.strerror(number))
            return operation(*arguments, **options)

        return call

    for owner, name in (
        *((os, name) for name in ("fsync", "mkdir", "rename", "replace")),
        *((Path, "write_text"), (safetensors.torch, "save_file"), (tempfile, "mkstemp")),
        (MetricsLog, "write"),
    ):
        setattr(owner, name, limited(getattr(owner, name)))


def _refused(case: Case, number: int) -> bool:
    status = case.run(prepare=partial(_fails, number, case.draw.randint(0, 160)))
    lines = [line for line in case.last_words().splitlines() if "gradcache-clip: " in line]
    named = len(lines) == 1 and ": expected " in lines[0] and "[Errno" not in lines[0]
    return status == 2 and named and case.kept_quiet()


def _vanishes(case: Case, what: str) -> bool:
    path = case.output if what == "run" else case.data / "train"
    aside = path.with_name("aside")
    status = case.run(prepare=in_step(case.draw.randint(1, STEPS - 1), partial(path.rename, aside)))
    said = case.last_words()
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)
    return status == 2 and str(path) in said and case.kept_quiet()


def _clock(_rank: int) -> None:
    draw, now = random.Random(0), time.time
    time.time = lambda: now() + draw.uniform(-1e7, 1e7)


def _clock_steps(case: Case) -> bool:
    for path in case.data.rglob("*"):
        os.utime(path, (4e9, case.draw.uniform(0, 4e9)))
    return case.run(prepare=_clock) == 0


def _interrupted(case: Case) -> bool:
    hurt = in_step(case.draw.randint(2, STEPS - 2), partial(_signal_me, signal.SIGINT))
    return case.run(prepare=hurt) == 130


def _signal_me(number: int) -> None:
    os.kill(os.getpid(), number)


def _spoil(path: Path, draw: random.Random, *, torn: bool) -> None:
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if torn:
        del content[place:]
    else:
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _spoils_a_checkpoint(case: Case, *, torn: bool) -> bool:
    stopped = _interrupted(case)
    newest = max((case.output / "checkpoints").iterdir())
    _spoil(case.draw.choice(sorted(newest.iterdir())), case.draw, torn=torn)
    return stopped


def _spoils_the_log(case: Case) -> bool:
    """As where the last line was cut off by a kill, behind the newest checkpoint."""
    stopped = _interrupted(case)
    with (case.output / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "los')
    return stopped


def _spoils(case: Case, name: str, *, torn: bool = False) -> bool:
    """What all of a run depends on is refused, or what is spoiled in it does not matter."""
    stopped = _interrupted(case)
    before = (case.output / name).read_bytes()
    _spoil(case.output / name, case.draw, torn=torn)
    status = case.run()
    lines = [line for line in case.last_words().splitlines() if "gradcache-clip: " in line]
    if status == 2:
        (case.output / name).write_bytes(before)
    return stopped and case.kept_quiet() and (status == 0 or (status == 2 and len(lines) == 1))


def _rank_is(case: Case, fault: Callable[[], None], words: str) -> bool:
    """The other rank ends with a word; the one that hears nothing is ended, as a launcher does."""
    fault = in_step(case.draw.randint(1, STEPS - 1), fault, rank=1)
    start = time.monotonic()
    first, second = case.start("distributed.timeout_s=5", prepare=fault)
    status = ended(first)
    second.kill()
    second.join()
    said = case.said[-2].read_text()
    return (
        status == 2
        and words in said
        and "Traceback" not in said
        and (time.monotonic() - start < 40)
    )


KINDS: dict[str, Inject] = {
    "killed": _kill,
    "killed, with workers": lambda case: _kill(case, "data.workers=2"),
    "killed in slow saves": lambda case: _kill(case, prepare=_slow_saves),
    "SIGINT": lambda case: _signalled(case, signal.SIGINT),
    "SIGINT to all, with workers": lambda case: _signalled(
        case, signal.SIGINT, "data.workers=2", group=True
    ),
    "SIGTERM to all, with workers": lambda case: _signalled(
        case, signal.SIGTERM, "data.workers=2", group=True
    ),
    "worker killed": lambda case: _worker(case, signal.SIGKILL),
    "worker stopped": lambda case: _worker(case, signal.SIGSTOP),
    "disk full": lambda case: _refused(case, errno.ENOSPC),
    "disk read-only": lambda case: _refused(case, errno.EROFS),
    "run folder vanishes": lambda case: _vanishes(case, "run"),
    "data vanish": lambda case: _vanishes(case, "data"),
    "clock steps": _clock_steps,
    "checkpoint flipped": lambda case: _spoils_a_checkpoint(case, torn=False),
    "checkpoint torn": lambda case: _spoils_a_checkpoint(case, torn=True),
    "log torn": _spoils_the_log,
    "tokenizer flipped": lambda case: _spoils(case, "tokenizer.json"),
    "settings flipped": lambda case: _spoils(case, "config.yaml"),
    "settings torn": lambda case: _spoils(case, "config.yaml", torn=True),
}


def _launcher_killed(case: Case) -> bool:
    """The ranks end with it, however it ends, and save what was trained as after any SIGTERM."""
    config = case.output.parent / "config.yaml"
    config.write_text("{}")
    command = [sys.executable, "-m", "gradcache_clip.cli", "launch", "--nproc", "2", "train"]
    settings = overrides(case.data, case.output, *SETTINGS, "train.checkpoint_every=0")
    launcher = subprocess.Popen([*command, str(config), *settings], stderr=subprocess.DEVNULL)
    while not (case.output / "metrics.jsonl").exists() and launcher.poll() is None:
        time.sleep(0.02)
    time.sleep(case.draw.uniform(0, case.seconds / 2))
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    for process in alive:
        process.kill()
    return not alive and any((case.output / "checkpoints").iterdir())


OF_RANKS: dict[str, Inject] = {
    "rank killed": lambda case: _rank_is(
        case, partial(_signal_me, signal.SIGKILL), "rank 1 ended without a word while taking step"
    ),
    "rank stopped": lambda case: _rank_is(
        case, partial(_signal_me, signal.SIGSTOP), "rank 1 ended without a word while taking step"
    ),
    # Linux alone tells of a parent's end.
    **({"launcher killed": _launcher_killed} if sys.platform == "linux" else {}),
    "rank stuck": lambda case: _rank_is(case, partial(time.sleep, 1e6), "kept the others waiting"),
}
QUICK = ("killed, with workers", "SIGINT", "worker killed", "disk full", "settings flipped")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    return reference(data, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_of_two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    return reference(data, tmp_path_factory.mktemp("two"), world=2)


def campaign(
    kind: str, inject: Inject, case: Callable[[Path, random.Random], Case],
    folder: Path, faults: int, record: Callable[[str, object], None],
) -> None:  # fmt: skip
    """Inject faults of a kind, note what came of them, and let none pass that was not exact."""
    survived, exact, bad = 0, 0, []
    for number in range(faults):
        hurt = case(folder / str(number), random.Random(f"{kind} {number}"))
        well, resumed = inject(hurt), hurt.resumed_exactly()
        survived, exact = survived + well, exact + resumed
        if not (well and resumed):
            bad += [f"{number}: {well=} {resumed=}", *(said.read_text() for said in hurt.said)]
    record("faults", (kind, faults, survived, exact))
    assert not bad, "\n".join(bad)


def _case(data: Path, whole: tuple[Path, float], world: int = 1) -> Callable[..., Case]:
    def case(folder: Path, draw: random.Random) -> Case:
        folder.mkdir()
        own = Path(shutil.copytree(data, folder / "data"))
        return Case(own, folder / "run", draw, *whole, world=world)

    return case


def _number(request: pytest.FixtureRequest) -> int:
    kinds = len(KINDS) + len(OF_RANKS)
    return max(FEW, -(-request.config.getoption("--faults") // kinds))


@pytest.mark.faults
@pytest.mark.parametrize("kind", QUICK)
def test_a_fault(data, whole, tmp_path, record_property, kind):
    campaign(kind, KINDS[kind], _case(data, whole), tmp_path, 1, record_property)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_faults(data, whole, tmp_path, request, record_property, kind):
    campaign(kind, KINDS[kind], _case(data, whole), tmp_path, _number(request), record_property)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP there")
@pytest.mark.parametrize("kind", OF_RANKS)
def test_faults_of_ranks(data, whole_of_two, tmp_path, request, record_property, kind):
    case = _case(data, whole_of_two, world=2)
    campaign(kind, OF_RANKS[kind], case, tmp_path, _number(request), record_property)
