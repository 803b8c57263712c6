"""Two machines in small: two network namespaces of one host, with a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from processes import SAME_BATCHES, alone, assert_same_run
from tiny_run import logged, overrides

STEPS = 14
TIMEOUT_S = 5
SETTINGS = (*SAME_BATCHES, f"train.steps={STEPS}", "train.checkpoint_every=2",
            f"distributed.timeout_s={TIMEOUT_S}")  # fmt: skip


class Machine:
    """A network namespace, which lives as long as the process that sleeps in it."""

    def __init__(self, name: str, address: str, *enter: str) -> None:
        self.name, self.address = name, address
        self.sleeper = subprocess.Popen([*enter, "sleep", "infinity"], stderr=subprocess.PIPE)
        time.sleep(0.5)
        if self.sleeper.poll() is not None:
            assert self.sleeper.stderr is not None
            pytest.skip(f"no network namespace here: {self.sleeper.stderr.read().decode().strip()}")

    @property
    def inside(self) -> list[str]:
        pid = str(self.sleeper.pid)
        return ["nsenter", "-t", pid, "-U", "-n", "--preserve-credentials"]

    def run(self, *command: str) -> None:
        done = subprocess.run([*self.inside, *command], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no cable between namespaces here: {done.stderr.strip()}")

    def connect(self) -> None:
        self.run("ip", "address", "add", f"{self.address}/24", "dev", self.name)
        for device in (self.name, "lo"):
            self.run("ip", "link", "set", device, "up")

    def launch(self, rank: int, settings: Sequence[str], config: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "gradcache_clip.cli", "launch", "--nproc", "1"]
        command += ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "10.77.0.1"]
        # Gloo would take the address that the name of the host stands for.
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": self.name}
        return subprocess.Popen(
            [*self.inside, *command, "train", str(config), *settings],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"expected {', '.join(missing)} to make network namespaces")
    first = Machine("cable0", "10.77.0.1", "unshare", "-r", "-n")
    second = Machine("cable1", "10.77.0.2", *first.inside, "unshare", "-n")
    ends = ["type", "veth", "peer", "name", "cable1", "netns", str(second.sleeper.pid)]
    first.run("ip", "link", "add", "cable0", *ends)
    for machine in (first, second):
        machine.connect()
    yield [first, second]
    for machine in (second, first):
        machine.sleeper.kill()
        machine.sleeper.communicate()


def _ended(launched: subprocess.Popen[str], patience_s: float) -> str:
    """What a launcher and its rank have said until their end."""
    try:
        return launched.communicate(timeout=patience_s)[0]
    except subprocess.TimeoutExpired:
        launched.kill()
        return f"hangs: {launched.communicate()[0]}"


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_two_machines_train_as_one_and_a_cut_cable_ends_both(data, tmp_path, machines):
    whole = alone(data, tmp_path / "alone", *SETTINGS)
    config, output = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text("{}")
    settings = overrides(data, output, *SETTINGS)
    launched = [machine.launch(rank, settings, config) for rank, machine in enumerate(machines)]
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or max(logged(output, "loss"), default=0) < 3:
        assert all(each.poll() is None for each in launched) and time.monotonic() < deadline
        time.sleep(0.02)
    machines[0].run("ip", "link", "set", "cable0", "down")
    cut = time.monotonic()
    said = [_ended(each, 60) for each in launched]
    assert time.monotonic() - cut < TIMEOUT_S + 40
    assert all(each.returncode not in (0, -signal.SIGKILL) for each in launched), said
    assert "rank 0 stopped while" in said[0] and "rank 1 " in said[0], said[0]
    assert "rank 1 stopped while" in said[1], said[1]
    assert not any("Traceback" in each for each in said), said
    assert max(logged(output, "loss")) < STEPS
    machines[0].run("ip", "link", "set", "cable0", "up")
    more = [*settings, "train.resume=true"]
    launched = [machine.launch(rank, more, config) for rank, machine in enumerate(machines)]
    said = [_ended(each, 240) for each in launched]
    assert [each.returncode for each in launched] == [0, 0], said
    assert_same_run(output, whole)
