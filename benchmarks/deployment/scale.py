"""What devices and messages cost: ten thousand devices in one process, small fleets of processes, and one server by itself.

    python benchmarks/deployment/scale.py simulation               10,000 devices in 100 edges, the default model, one process
    python benchmarks/deployment/scale.py processes --devices 8    a cloud, two edges and devices with next to no work: what a round costs
    python benchmarks/deployment/scale.py server --nodes 200       one tier's server and its nodes over TLS: seconds and bytes of each

Each prints a table; the directory given with --work is written to and removed.
"""

import argparse
import logging
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cooperllm
from cooperllm.config import ArmName, EngineName, FederationConfig, Partition, RunConfig, RuntimeName
from cooperllm.deployment.cloud_process import run_cloud_process
from cooperllm.deployment.edge_process import open_server
from cooperllm.deployment.enrolment import Places, enroll, read_public_keys
from cooperllm.deployment.settings import CloudSettings, EdgeSettings, Job, read_settings
from cooperllm.deployment.together import edges_and_devices, prepare
from cooperllm.link.fleet_link import FleetLink
from cooperllm.link.fleet_node import Server, serve
from cooperllm.process_log import LogFormat, begin_log
from cooperllm.process_memory import footprint
from cooperllm.run_directory import RunDirectory

WARM_UP_ROUNDS = 3
PORT = 9300
ORDER_BYTES, ANSWER_BYTES = 13_700, 13_200
"""What the default model's order and answer are (benchmarks/results/links_x86_64_2026-11-21.md)."""


def simulation(work: Path, devices: int, edges: int, sampled: int, rounds: int, texts_of_a_device: int) -> None:
    """Trains in this process and prints what it took."""
    config = cooperllm.recipe("demo").with_arm(ArmName.FEEDBACK)
    private = replace(config.data.private, max_examples=devices * texts_of_a_device)
    config = replace(
        config,
        num_rounds=rounds,
        evaluate_every=rounds,
        runtime=RuntimeName.ONNX_INT8_WEIGHTS,
        engine=EngineName.GRID,
        data=replace(config.data, private=private),
        federation=replace(
            config.federation, num_devices=devices, num_edges=edges, devices_per_round=sampled, partition=Partition.IID, min_reports=sampled
        ),
    )
    begun, peaks = time.monotonic(), list[float]()
    run = cooperllm.run(config, work / "run", lambda *_: peaks.append(footprint().peak_mib))
    rows = RunDirectory(run.path).rounds()
    seconds = [row["seconds"] for row in rows]
    print(f"{devices} devices of {texts_of_a_device} texts in {edges} edges, {sampled} a round; {time.monotonic() - begun:.0f} s in all")
    print("| round, median | first round | a device of the round | before the first round's end | peak | down, up a round |")
    print("|---|---|---|---|---|---|")
    down, up = (statistics.median(row[name] for row in rows) for name in ("bytes_down", "bytes_up"))
    median_s = statistics.median(seconds[:-1])
    print(
        f"| {median_s:.1f} s | {seconds[0]:.1f} s | {median_s / sampled * 1e3:.0f} ms | {peaks[0]:.0f} MiB "
        f"| {footprint().peak_mib:.0f} MiB | {down / 1e3:.0f}, {up / 1e3:.0f} kB |"
    )


def processes(work: Path, devices: int, rounds: int, edges: int) -> None:
    """Runs tiers as processes with next to no work, every device in every round, and prints what a round takes."""
    config = cooperllm.recipe("tiny").with_arm(ArmName.FEEDBACK)
    federation = replace(config.federation, num_devices=devices, num_edges=edges, devices_per_round=devices)
    config = replace(config, federation=federation, num_rounds=rounds, evaluate_every=rounds, runtime=RuntimeName.ONNX)
    addresses = [f"127.0.0.1:{PORT + number}" for number in range(1 + edges)]
    prepare(work / "all", config, Places(cloud=addresses[0], edges=tuple(addresses[1:])), has_texts=True)
    with edges_and_devices(work / "all"):
        run_cloud_process(read_settings(work / "all" / "cloud" / "cloud.toml", CloudSettings))
    rows = RunDirectory(work / "all" / "cloud" / "run").rounds()[WARM_UP_ROUNDS:-1]
    seconds = [row["seconds"] for row in rows]
    lost = sum(sum(row["dropped"].values()) for row in rows)
    print("| edges, devices | rounds | round, median | fastest, slowest | lost |")
    print("|---|---|---|---|---|")
    print(f"| {edges}, {devices} | {len(rows)} | {statistics.median(seconds):.2f} s | {min(seconds):.2f}, {max(seconds):.2f} s | {lost} |")


def server(work: Path, nodes: int, rounds: int, idle_s: float, order_bytes: int) -> None:
    """Serves nodes that echo in another process, and prints what they cost this one."""
    federation = FederationConfig(num_devices=nodes, num_edges=1, devices_per_round=1)
    enroll(work, Job(config=RunConfig(federation=federation), num_parameters=1), Places(cloud="127.0.0.1:1", edges=(f"127.0.0.1:{PORT}",)))
    edge = work / "edge-0"
    before_mib = footprint().dirty_mib
    with open_server(read_public_keys(edge / "devices"), read_settings(edge / "edge.toml", EdgeSettings)) as serving:
        enrolled_mib = footprint().dirty_mib
        with subprocess.Popen([sys.executable, __file__, "nodes", "--work", str(work)], stdin=subprocess.PIPE) as others:
            try:
                while len(serving.online()) < nodes:
                    time.sleep(0.1)
                time.sleep(5)  # questions are open, connections warm
                used_s, connected_mib = time.process_time(), footprint().dirty_mib
                time.sleep(idle_s)
                idle_cpu_s = (time.process_time() - used_s) / idle_s / nodes
                costs = [_round(serving, nodes, order_bytes) for _ in range(rounds)]
            finally:
                others.communicate(b"\n")
    wall_s, cpu_s = (statistics.median(cost[position] for cost in costs) for position in (0, 1))
    print(f"{nodes} nodes, orders of {order_bytes} and answers of {ANSWER_BYTES} bytes, TLS; {rounds} rounds")
    print("| enrolled, a node | connected, a node | waiting, a node | order and answer: of this process | round: all answered |")
    print("|---|---|---|---|---|")
    print(
        f"| {(enrolled_mib - before_mib) / nodes * 1024:.0f} KiB | {(connected_mib - enrolled_mib) / nodes * 1024:.0f} KiB "
        f"| {idle_cpu_s * 1e3:.2f} ms a second | {cpu_s / nodes * 1e3:.1f} ms | {wall_s:.2f} s |"
    )


def _round(serving: Any, nodes: int, order_bytes: int) -> tuple[float, float]:
    """Seconds by the clock and of this process's processors for an order to every node and all the answers."""
    link, begun_s, used_s = FleetLink(serving, "node", 300.0), time.monotonic(), time.process_time()
    answers = link.send((number, os.urandom(order_bytes)) for number in range(nodes))
    assert len(answers) == nodes, link.lost_reasons
    return time.monotonic() - begun_s, time.process_time() - used_s


def echoing_nodes(work: Path) -> None:
    """Is every device of a deployment, a thread each, until a line comes in."""
    stop, threads = threading.Event(), list[threading.Thread]()
    answer = os.urandom(ANSWER_BYTES)
    for folder in work.glob("device-*"):
        shown = {"key": folder / "node.key", "certificate": folder / "node.pem"}
        there = Server(address=f"127.0.0.1:{PORT}", authority=folder / "authority.pem", **shown)
        threads.append(threading.Thread(target=serve, args=(there, lambda _: answer, stop)))
        threads[-1].start()
    sys.stdin.readline()
    stop.set()
    for thread in threads:
        thread.join()


def main() -> None:
    """Does what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("simulation", "processes", "server", "nodes"))
    parser.add_argument("--work", type=Path, default=Path("runs/scale"))
    parser.add_argument("--devices", type=int, help="10000 in a simulation, 8 as processes")
    parser.add_argument("--edges", type=int, help="100 in a simulation, 2 as processes")
    parser.add_argument("--sampled", type=int, default=64)
    parser.add_argument("--rounds", type=int, help="5 in a simulation, 20 otherwise")
    parser.add_argument("--texts", type=int, default=16, help="of each device of a simulation")
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--order-bytes", type=int, default=ORDER_BYTES)
    parser.add_argument("--idle-s", type=float, default=20.0)
    arguments = parser.parse_args()
    if arguments.part == "nodes":
        logging.disable()
        echoing_nodes(arguments.work)
        return
    begin_log(LogFormat.TEXT, "cloud")
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    try:
        if arguments.part == "simulation":
            simulation(
                arguments.work,
                arguments.devices or 10_000,
                arguments.edges or 100,
                arguments.sampled,
                arguments.rounds or 5,
                arguments.texts,
            )
        elif arguments.part == "processes":
            processes(arguments.work, arguments.devices or 8, arguments.rounds or 20, arguments.edges or 2)
        else:
            server(arguments.work, arguments.nodes, arguments.rounds or 20, arguments.idle_s, arguments.order_bytes)
    finally:
        shutil.rmtree(arguments.work, ignore_errors=True)


if __name__ == "__main__":
    main()
