"""Peak memory of one device step against plain inference on the same batch, each in a process of its own.

Peak is VmHWM after the work minus RSS after imports (the import-only baseline), so it holds the model, the batch and everything in between.
The step is a whole one: decode the order, rebuild the span, measure every slope, encode the report. Prints a table and writes it.

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

ROWS = ("inference", "measured", "mezo-fl", "fedavg-bp")


def status_mib(field: str) -> float:
    """Reads one figure of this process from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def work(row: str, batch_size: int, max_tokens: int, caches_prefix: bool) -> None:
    """Does one row's work in this process and prints its peak in MiB."""
    import torch

    import cooperllm
    from cooperllm import session  # noqa: F401 -- part of the baseline
    from cooperllm.assembly import Assembly, Material
    from cooperllm.config import ArmName, EngineName
    from cooperllm.link.codec import encode
    from cooperllm.run_directory import RunDirectory

    arm = ArmName.MEASURED if row == "inference" else ArmName(row)
    config = cooperllm.recipe("demo").with_arm(arm)
    config = replace(
        config,
        engine=EngineName.LOOPBACK,
        model=replace(config.model, max_tokens=max_tokens, caches_prefix=caches_prefix),
        federation=replace(config.federation, batch_size=batch_size, num_devices=4, devices_per_round=1),
    )
    torch.set_num_threads(1)
    baseline = status_mib("VmRSS")
    material = Material(config)
    assembly = Assembly(config, RunDirectory(Path("never-written")), material)
    if row == "inference":
        batch = material.model.batch(material.private, material.shards[0][:batch_size].tolist())
        with torch.inference_mode():
            for _ in range(3):
                material.model.loss(torch.from_numpy(assembly.start.theta), batch)
    else:
        # The cloud's part is prepared by another process, so that its back-propagation does not count here.
        order = Path(os.environ["COOPERLLM_ORDER"]).read_bytes()
        assembly.devices().answer(order)
        assert order, encode
    print(json.dumps({"peak_mib": status_mib("VmHWM") - baseline, "absolute_mib": status_mib("VmHWM"), "imports_mib": baseline}))


def prepare(row: str, batch_size: int, max_tokens: int, caches_prefix: bool, path: Path) -> None:
    """The cloud's part: after two rounds, so that momentum and every column exist, writes the third order of a device."""
    import cooperllm
    from cooperllm.assembly import Assembly, Material
    from cooperllm.config import ArmName, EngineName
    from cooperllm.link.codec import encode
    from cooperllm.link.loopback import Loopback
    from cooperllm.round import run_round
    from cooperllm.run_directory import RunDirectory

    config = cooperllm.recipe("demo").with_arm(ArmName(row))
    config = replace(
        config,
        engine=EngineName.LOOPBACK,
        model=replace(config.model, max_tokens=max_tokens, caches_prefix=caches_prefix),
        federation=replace(config.federation, batch_size=batch_size, num_devices=4, devices_per_round=1),
    )
    assembly = Assembly(config, RunDirectory(Path("never-written")), Material(config))
    cloud, edges, link = assembly.cloud(), assembly.edges(), Loopback(assembly.devices())
    for _ in range(2):
        run_round(cloud, edges, link)
    plan = cloud.plan().plan
    order = next(order for edge in assembly.edges() for order in edge.fan_out(plan, cloud.replica))
    snapshot = replace(order, updates=(), snapshot=cloud.replica.snapshot())
    path.write_bytes(encode(snapshot))


def measured(row: str, batch_size: int, max_tokens: int, caches_prefix: bool, order: Path) -> dict[str, float]:
    """Runs one row in processes of its own."""
    settings = [row, str(batch_size), str(max_tokens), str(int(caches_prefix))]
    environment = os.environ | {"COOPERLLM_ORDER": str(order), "OMP_NUM_THREADS": "1"}
    if row != "inference":
        subprocess.run([sys.executable, __file__, "--prepare", *settings], check=True, env=environment, capture_output=True)
    found = subprocess.run([sys.executable, __file__, "--row", *settings], check=True, env=environment, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    """Measures every row at several batch settings and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row or arguments.prepare:
        row, batch_size, max_tokens, caches_prefix = arguments.row or arguments.prepare
        values = row, int(batch_size), int(max_tokens), bool(int(caches_prefix))
        work(*values) if arguments.row else prepare(*values, Path(os.environ["COOPERLLM_ORDER"]))
        return
    date = datetime.date.today()
    lines = [
        f"# Device memory, {date}",
        "",
        f"Command: `python benchmarks/memory/benchmark.py`; {platform.machine()}, {os.cpu_count()} cores, one thread, "
        f"Python {platform.python_version()}. MiniLM-L6, LoRA r 8 on query and value of the last two layers; MiB over the import-only baseline.",
        "",
        "| batch x tokens (at most) | frozen prefix | " + " | ".join(ROWS) + " | measured / inference |",
        "|---|---|" + "---|" * (len(ROWS) + 1),
    ]
    order = Path("order.tmp").resolve()
    for batch_size, max_tokens, caches_prefix in ((16, 32, False), (16, 32, True), (1, 32, False), (64, 32, False)):
        found = {row: measured(row, batch_size, max_tokens, caches_prefix, order) for row in ROWS}
        peaks = " | ".join(f"{found[row]['peak_mib']:.0f}" for row in ROWS)
        ratio = found["measured"]["peak_mib"] / found["inference"]["peak_mib"]
        lines.append(f"| {batch_size} x {max_tokens} | {'cached' if caches_prefix else 'computed'} | {peaks} | {ratio:.3f} |")
        print(lines[-1], flush=True)
    order.unlink()
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"memory_minilm_{platform.machine()}_{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
