"""Peak memory of one device step against plain inference on the same batch, each in a process of its own.

Peak is VmHWM after the work minus RSS after imports (the import-only baseline), so it holds the model, the batch and everything in between.
The step is a whole one: decode the order, take the snapshot in, rebuild the span, measure every slope, encode the report.

    python benchmarks/memory/benchmark.py
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import cooperllm
from cooperllm.assembly import Assembly, Material
from cooperllm.config import ArmName
from cooperllm.link.codec import encode
from cooperllm.link.loopback import Loopback
from cooperllm.process_memory import footprint
from cooperllm.round import run_round
from cooperllm.run_directory import RunDirectory
from cooperllm.tiers import LocalEdges

ROWS = ("inference", "measured", "feedback", "mezo-fl", "fedavg-bp", "fedavg-bp-checkpointed")


class Setting(NamedTuple):
    """What a device runs on.

    Attributes:
        batch_size: Texts.
        prefix: What becomes of frozen layers: "computed" in every pass, "cached" once per text, or "none" frozen.
        num_layers: Adapted layers, the last ones of six.
    """

    batch_size: int
    prefix: str
    num_layers: int


SETTINGS = (
    Setting(16, "computed", 2),
    Setting(16, "cached", 2),
    Setting(1, "computed", 2),
    Setting(16, "none", 6),
)


def assembly_of(row: str, setting: Setting) -> Assembly:
    """Builds the run whose device is looked at; nothing is written."""
    config = cooperllm.recipe("demo").with_arm(ArmName.MEASURED if row == "inference" else ArmName(row))
    config = replace(
        config,
        model=replace(config.model, caches_prefix=setting.prefix == "cached", last_layers=setting.num_layers),
        federation=replace(config.federation, batch_size=setting.batch_size, num_devices=4, devices_per_round=1),
    )
    return Assembly(config, RunDirectory(Path("never-written")), Material(config))


def work(row: str, assembly: Assembly, order: Path) -> None:
    """Does one row's work in this process and prints its peak in MiB."""
    torch.set_num_threads(1)
    baseline = footprint().resident_mib
    if row == "inference":
        material = assembly.material
        batch = material.model.batch(material.private, material.shards[0][: assembly.config.federation.batch_size].tolist())
        with torch.inference_mode():
            torch.nn.functional.cross_entropy(material.model.scores(torch.from_numpy(assembly.start.theta), batch), batch.labels)
    else:
        assembly.devices().answer(order.read_bytes())
    print(json.dumps({"peak_mib": footprint().peak_mib - baseline}))


def prepare(assembly: Assembly, order: Path) -> None:
    """The cloud's part, in another process: after two rounds momentum, basis and maps exist; writes a device's third order."""
    cloud, tiers = assembly.cloud(), LocalEdges(assembly.edges(), Loopback(assembly.devices()))
    for _ in range(2):
        run_round(cloud, tiers)
    plan = cloud.plan().plan
    first = next(found for edge in assembly.edges() for found in edge.fan_out(replace(plan, cohort=(0,), maps=cloud.maps()), cloud.replica))
    order.write_bytes(encode(replace(first, updates=(), snapshot=cloud.replica.snapshot())))


def peak_mib(row: str, setting: Setting, order: Path) -> float:
    """Runs one row in processes of its own."""
    settings = [row, str(order), *map(str, setting)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if row != "inference":
        subprocess.run([sys.executable, __file__, "--prepare", *settings], check=True, env=environment)
    command = [sys.executable, __file__, "--row", *settings]
    found = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])["peak_mib"]


def main() -> None:
    """Measures every row at several batch settings and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row or arguments.prepare:
        row, order, batch_size, prefix, num_layers = arguments.row or arguments.prepare
        assembly = assembly_of(row, Setting(int(batch_size), prefix, int(num_layers)))
        work(row, assembly, Path(order)) if arguments.row else prepare(assembly, Path(order))
        return
    date = datetime.date.today()
    lines = [
        f"# Device memory, {date}",
        "",
        f"Command: `python benchmarks/memory/benchmark.py`; {platform.machine()}, one thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}. MiniLM-L6, LoRA r 8 on query and value, texts of the demo; MiB over the import-only baseline.",
        "",
        "| batch | adapted layers | frozen prefix | "
        + " | ".join(ROWS)
        + " | measured / inference | feedback / inference | fedavg-bp / inference |",
        "|---|---|---|" + "---|" * (len(ROWS) + 3),
    ]
    order = Path("order.tmp").resolve()
    for setting in SETTINGS:
        peaks = {row: peak_mib(row, setting, order) for row in ROWS}
        cells = " | ".join(f"{peak:.0f}" for peak in peaks.values())
        ratios = " | ".join(f"{peaks[row] / peaks['inference']:.3f}" for row in ("measured", "feedback", "fedavg-bp"))
        lines.append(f"| {setting.batch_size} | {setting.num_layers} | {setting.prefix} | {cells} | {ratios} |")
        print(lines[-1], flush=True)
    order.unlink()
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"memory_minilm_{platform.machine()}_{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
