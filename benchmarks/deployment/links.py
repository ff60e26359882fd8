"""Rounds over links that are really slow: cloud, edges and devices as processes in network namespaces of their own, joined by a bridge.

Each host has one cable (a veth pair) to the bridge. A token bucket limits its rate, to the host and from it, with `netem` for delay where
the kernel has it. Needs Linux, root and iproute2; where namespaces are not permitted it says so and ends. Everything it makes in the system
begins with "cpl" and is removed at the end, whatever happens.

    sudo python benchmarks/deployment/links.py --work runs/links --recipe tiny --rates 0 100 10 1
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cooperllm
from cooperllm.config import RunConfig, RuntimeName
from cooperllm.deployment.enrolment import Places
from cooperllm.deployment.together import prepare
from cooperllm.options import changed
from cooperllm.run_directory import RunDirectory

BRIDGE, PREFIX = "cplbr", "cpl"
BURST_S, LATENCY_S = 0.01, 0.4
WARM_UP_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host of the emulated network.

    Attributes:
        kind: "cloud", "edge" or "device".
        number: Of its kind.
        address: On the bridge.
    """

    kind: str
    number: int
    address: str

    @property
    def namespace(self) -> str:
        """Name of its namespace, short enough for its cable, too."""
        return f"{PREFIX}{self.kind[0]}{self.number}"

    @property
    def folder(self) -> str:
        """Its directory in a deployment."""
        return self.kind if self.kind == "cloud" else f"{self.kind}-{self.number}"


def hosts_of(config: RunConfig) -> list[Host]:
    """Lists every host of a run."""
    federation = config.federation
    return [
        Host(kind="cloud", number=0, address="10.77.0.1"),
        *(Host(kind="edge", number=number, address=f"10.77.0.{10 + number}") for number in range(federation.num_edges)),
        *(
            Host(kind="device", number=number, address=f"10.77.{1 + number // 200}.{number % 200}")
            for number in range(federation.num_devices)
        ),
    ]


def ip(*words: str, check: bool = True) -> bool:
    """Runs `ip`, or `tc` where the first word says so."""
    command = list(words) if words[0] == "tc" else ["ip", *words]
    return subprocess.run(command, check=check, capture_output=True).returncode == 0


@contextlib.contextmanager
def network(hosts: list[Host]) -> Iterator[None]:
    """Makes the bridge, the namespaces and the cables, and takes all away again."""
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for host in hosts:
            name = host.namespace
            ip("netns", "add", name)
            ip("link", "add", f"{name}b", "type", "veth", "peer", "name", f"{name}h")
            ip("link", "set", f"{name}h", "netns", name)
            ip("link", "set", f"{name}b", "master", BRIDGE)
            ip("link", "set", f"{name}b", "up")
            ip("-n", name, "address", "add", f"{host.address}/16", "dev", f"{name}h")
            ip("-n", name, "link", "set", f"{name}h", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for host in hosts:
            ip("netns", "del", host.namespace, check=False)
            ip("link", "del", f"{host.namespace}b", check=False)
        ip("link", "del", BRIDGE, check=False)


def limit(host: Host, down_mbit: float, up_mbit: float) -> None:
    """Limits a host's cable; 0 leaves it as it is."""
    name = host.namespace
    for rate, words in (
        (down_mbit, ["tc", "qdisc", "replace", "dev", f"{name}b"]),
        (up_mbit, ["tc", "-n", name, "qdisc", "replace", "dev", f"{name}h"]),
    ):
        if rate:
            burst = max(1600, int(rate * 1e6 / 8 * BURST_S))
            ip(*words, "root", "tbf", "rate", f"{rate}mbit", "burst", str(burst), "latency", f"{LATENCY_S}s")


@contextlib.contextmanager
def processes(hosts: list[Host], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs every host's process in its namespace; yields the cloud's."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    running: list[subprocess.Popen[bytes]] = []
    try:
        for host in hosts:
            folder = directory / host.folder
            command = [
                "ip",
                "netns",
                "exec",
                host.namespace,
                sys.executable,
                "-m",
                "cooperllm",
                host.kind,
                str(folder / f"{host.kind}.toml"),
            ]
            with (folder / f"{host.kind}.log").open("ab") as words:
                running.append(subprocess.Popen(command, stdout=words, stderr=words, env=environment))
        yield running[0]
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def on_the_wire(hosts: list[Host]) -> tuple[int, int]:
    """Counts what has gone to and from all devices so far, headers, handshakes and heartbeats included."""
    folders = [Path(f"/sys/class/net/{host.namespace}b/statistics") for host in hosts if host.kind == "device"]
    to, by = (sum(int((folder / f"{way}_bytes").read_text()) for folder in folders) for way in ("tx", "rx"))
    return to, by


def measured(directory: Path, hosts: list[Host], rate: float, timeout_s: float, drop: tuple[int, float] | None) -> dict[str, float]:
    """Runs a deployment with a rate of every device's link, a quarter of it up, and sums its rounds up; a drop is (round, new rate)."""
    file = directory / "cloud" / "run" / "rounds.jsonl"
    deadline = time.monotonic() + timeout_s
    seen: list[tuple[int, tuple[int, int]]] = []
    with network(hosts):
        for host in hosts:
            if host.kind == "device":
                limit(host, rate, rate / 4)
        with processes(hosts, directory) as cloud:
            while cloud.poll() is None and time.monotonic() < deadline:
                done = len(file.read_text().splitlines())
                if drop is not None and done >= drop[0]:
                    for host in hosts:
                        if host.kind == "device":
                            limit(host, drop[1], drop[1] / 4)
                    drop = None
                if done >= WARM_UP_ROUNDS and (not seen or done > seen[-1][0]):
                    seen.append((done, on_the_wire(hosts)))
                time.sleep(0.02)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows[WARM_UP_ROUNDS:] if row["accuracy"] is None]
    devices = len(rows[0]["answered"])
    times = RunDirectory(directory / "cloud" / "run").times()
    (begun, before), (ended, after) = seen[0], seen[-2]  # the last round is followed by an evaluation
    down, up = (statistics.median(row[name] for row in rows) / devices for name in ("bytes_down", "bytes_up"))
    wire_down, wire_up = ((later - earlier) / (ended - begun) / devices for later, earlier in zip(after, before, strict=True))
    return {
        "round_s": statistics.median(row["seconds"] for row in rows),
        "mean_s": statistics.mean(row["seconds"] for row in rows),
        "slowest_round_s": max(row["seconds"] for row in rows),
        "bytes_down": down,
        "bytes_up": up,
        "wire_down": wire_down,
        "wire_up": wire_up,
        "transfer_s": 8e-6 * (wire_down / rate + wire_up / (rate / 4)) if rate else 0.0,
        "worked_s": statistics.median(
            device["worked_s"] for row in times[WARM_UP_ROUNDS:] for edge in row["edges"] for device in edge["devices"]
        ),
        "lost": sum(sum(row["dropped"].values()) for row in rows),
    }


def _tell_rounds(directory: Path) -> None:
    """Prints what each round took, which bits its devices had, and how well the model did where that was looked at."""
    files = RunDirectory(directory / "cloud" / "run")
    for row, times in zip(files.rounds(), files.times(), strict=True):
        bits = sorted(one["bits"] for edge in times["edges"] for one in edge["scheduled"])
        accuracy = "" if row["accuracy"] is None else f", accuracy {row['accuracy']:.3f}"
        words = f"round {row['round']}: {row['seconds']:.2f} s, {row['bytes_up'] / 1e3:.1f} kB up, bits {bits or 'as planned'}{accuracy}"
        print(words, flush=True)


def main() -> None:
    """Prints a row for each rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/links"))
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--data-directory", default="data")
    parser.add_argument("--runtime", type=RuntimeName, default=RuntimeName.ONNX)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--edges", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="any setting, as for `cooperllm run`")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0], help="rounds that devices may be behind: 0, 1 or both")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--evaluate-every", type=int, help="rounds between evaluations, whose rounds are told apart; the last alone otherwise"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 100, 10, 1], help="Mbit/s to a device; 0 sets no limit")
    parser.add_argument("--adapt", action="store_true", help="let edges choose the bits of devices' estimates")
    parser.add_argument("--drop", nargs=2, metavar=("ROUND", "MBIT"), help="after this round every device's link has this rate")
    parser.add_argument("--timeout-s", type=float, default=1800)
    arguments = parser.parse_args()
    if shutil.which("ip") is None or not ip("netns", "add", f"{PREFIX}try", check=False):
        print("no network namespaces here: Linux, root and iproute2 are needed; nothing was measured")
        return
    ip("netns", "del", f"{PREFIX}try", check=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # an exception, so that everything is taken away
    config = changed(cooperllm.recipe(arguments.recipe, arguments.data_directory).config, {"settings": arguments.set})
    federation = replace(config.federation, num_devices=arguments.devices, num_edges=arguments.edges, devices_per_round=arguments.devices)
    every = arguments.evaluate_every or arguments.rounds
    config = replace(config, federation=federation, num_rounds=arguments.rounds, evaluate_every=every, runtime=arguments.runtime)
    hosts = hosts_of(config)
    places = Places(cloud=f"{hosts[0].address}:9100", edges=tuple(f"{host.address}:9101" for host in hosts if host.kind == "edge"))
    whole = arguments.work / "prepared"
    if not whole.exists():
        prepare(whole, config, places, has_texts=True)
    print("| Mbit/s down, up | staleness | round, median | mean | slowest | messages to, from a device ", end="")
    print("| on the wire to, from it | at work | wire at that rate | lost |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for rate, staleness in itertools.product(arguments.rates, arguments.staleness):
        directory = arguments.work / f"rate-{rate:g}-staleness-{staleness}"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(whole, directory)
        for file in (*directory.glob("*/job.json"), directory / "cloud" / "run" / "config.json"):
            text = re.sub(r'"staleness": ?0', f'"staleness": {staleness}', file.read_text())
            file.write_text(re.sub(r'"adapts_bits": ?false', f'"adapts_bits": {json.dumps(arguments.adapt)}', text))
        drop = None if arguments.drop is None else (int(arguments.drop[0]), float(arguments.drop[1]))
        found = measured(directory, hosts, rate, arguments.timeout_s, drop)
        speed = f"{rate:g}, {rate / 4:g}" if rate else "no limit"
        print(
            f"| {speed} | {staleness} | {found['round_s']:.2f} s | {found['mean_s']:.2f} s | {found['slowest_round_s']:.2f} s "
            f"| {found['bytes_down'] / 1e3:.1f}, {found['bytes_up'] / 1e3:.1f} kB "
            f"| {found['wire_down'] / 1e3:.1f}, {found['wire_up'] / 1e3:.1f} kB "
            f"| {found['worked_s']:.2f} s | {found['transfer_s']:.2f} s | {found['lost']:.0f} |",
            flush=True,
        )
        if drop is not None or arguments.evaluate_every is not None:
            _tell_rounds(directory)


if __name__ == "__main__":
    main()
