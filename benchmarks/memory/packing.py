"""Time and memory of a device's passes over instructions of unlike lengths: a row for each, and rows that are shared (`model.packing`).

stories260K on instruct_1100, the recipe `instructions`. The same batches for both; each row of the table is a process of its own with one
thread. CPU seconds are those of the median batch, each after one that is not counted; peak is VmHWM above what is resident before.

    python benchmarks/memory/packing.py --data-directory ../shared/data
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from row_processes import medians

import cooperllm
from cooperllm.algorithm import noise
from cooperllm.assembly import Material
from cooperllm.device.torch_forward import TorchForward
from cooperllm.process_memory import footprint, reset_peak

BATCHES = 12
PASSES = {
    "a loss": lambda device, theta, chosen: device.evaluate(chosen)[0](theta[None]),
    "a gradient, a layer at a time": lambda device, theta, chosen: device.estimate(theta, chosen, None),
}


def work(name: str, size: int, packing: bool, data_directory: str) -> None:  # noqa: FBT001 -- a row's own
    """Does one row's work in this process and prints what it took."""
    torch.set_num_threads(1)
    config = cooperllm.recipe("instructions", data_directory).config
    material = Material(replace(config, model=replace(config.model, packing=packing)))
    model, examples = material.model, material.private
    device, theta = TorchForward(model, examples, range(len(examples)), None), model.initial_parameters(0)
    order, seconds, share = noise.permutation(0, 0, len(examples)).tolist(), list[float](), list[float]()
    reset_peak()
    resident = footprint().resident_mib
    for number in range(BATCHES):
        chosen = order[number * size : (number + 1) * size]
        mask = model.batch(examples, chosen).mask
        share.append(float(mask.sum()) / mask.numel())
        PASSES[name](device, theta, chosen)
        begun_s = time.process_time()
        PASSES[name](device, theta, chosen)
        seconds.append(time.process_time() - begun_s)
    figures = {"cpu_ms": 1e3 * statistics.median(seconds), "tokens": statistics.median(share), "peak_mib": footprint().peak_mib - resident}
    print(json.dumps(figures))


def main() -> None:
    """Measures every row and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--data-directory", default="../shared/data")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        name, size, way = arguments.row
        work(name, int(size), way == "shared", arguments.data_directory)
        return
    date = datetime.date.today()
    lines = [
        f"# Instructions that share rows, {date}",
        "",
        f"Command: `python benchmarks/memory/packing.py --repeats {arguments.repeats}`; {platform.machine()}, one thread, Python "
        f"{platform.python_version()}, torch {torch.__version__}. stories260K on instruct_1100, at most 128 tokens, LoRA r 8 on query and "
        f"value of all layers; {BATCHES} batches, medians of {arguments.repeats} processes.",
        "",
        "| pass | batch | rows | share of tokens that are no padding | CPU ms | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in PASSES:
        for size in ("8", "16"):
            for way in ("their own", "shared"):
                command = [sys.executable, __file__, "--data-directory", arguments.data_directory, "--row", name, size, way]
                found = medians(command, arguments.repeats)
                lines.append(f"| {name} | {size} | {way} | {found['tokens']:.0%} | {found['cpu_ms']:.1f} | {found['peak_mib']:.0f} |")
                print(lines[-1], flush=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"packing_{platform.machine()}_{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
