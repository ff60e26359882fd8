"""Zeroth order on every weight of a 125M-parameter decoder: time and memory of a device's round against plain inference.

The decoder has OPT-125M's shape and random weights: this is about time and memory, not about accuracy. Each row is a process of its own
with one thread. A device answers three orders, a query each, the later ones with the step that the cloud has made of the one before; the
third's time is the row's. θ lies in a file that is mapped copy on write. Peak is VmHWM of the process, imports and mapped weights included.

    python benchmarks/memory/every_weight.py
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

import cooperllm
from cooperllm.algorithm import replay
from cooperllm.assembly import Assembly, Material
from cooperllm.config import (
    AdapterKind,
    ArmName,
    Distribution,
    ModelConfig,
    Objective,
    OptimizerConfig,
    OptimizerKind,
    Partition,
    SourceConfig,
)
from cooperllm.device import Host
from cooperllm.device.torch_forward import TorchForward
from cooperllm.link.codec import encode
from cooperllm.link.loopback import Loopback
from cooperllm.messages import Plan
from cooperllm.pretrained import tiny_llama
from cooperllm.process_memory import footprint
from cooperllm.round import run_round
from cooperllm.run_directory import RunDirectory
from cooperllm.tiers import LocalEdges

BATCH, TOKENS, ORDERS = 8, 17, 3
SHAPE = {
    "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12,
    "word_embed_proj_dim": 768, "max_position_embeddings": 2048,
}  # fmt: skip
INFERENCE, EXACT, LORA = "inference", "back-propagation", "LoRA r 8, query and value"
EVERY = {"every weight, signs": Distribution.RADEMACHER, "every weight, normal numbers": Distribution.NORMAL}
ROWS = (INFERENCE, *EVERY, LORA, EXACT)


def build(directory: Path) -> None:
    """Writes the model and some texts of the same length."""
    with torch.random.fork_rng():
        transformers.OPTForCausalLM(transformers.OPTConfig(**SHAPE)).save_pretrained(directory / "model")
    tiny_llama(causal=False)[1].save_pretrained(directory / "model")
    texts = [f"text number {number:05d}"[:TOKENS] for number in range(64)]
    (directory / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def assembly_of(row: str, directory: Path) -> Assembly:
    """Builds the run whose only device is looked at."""
    config = cooperllm.recipe("tiny").with_arm(ArmName.MEZO_FL)
    model = ModelConfig(
        name=str(directory / "model"),
        objective=Objective.NEXT_TOKEN,
        prompt="{text}",
        max_tokens=TOKENS,
        target_modules=("q_proj", "v_proj"),
        last_layers=None,
        adapter=AdapterKind.FULL if row in EVERY else AdapterKind.LORA,
    )
    source = SourceConfig(name=str(directory / "texts.jsonl"), label_column=None)
    config = replace(
        config,
        model=model,
        data=replace(config.data, public=source, private=source),
        federation=replace(config.federation, num_devices=1, num_edges=1, devices_per_round=1, batch_size=BATCH, partition=Partition.IID),
        optimizer=OptimizerConfig(kind=OptimizerKind.SGD),
        arm=replace(config.arm, queries=1, distribution=EVERY.get(row, Distribution.NORMAL)),
    )
    return Assembly(config, RunDirectory(directory / "never-written"), Material(config))


def prepare(row: str, directory: Path) -> None:
    """The cloud's part: θ_0 in a file, and a device's three orders with the steps between them."""
    assembly = assembly_of(row, directory)
    np.save(directory / "theta.npy", assembly.start.theta)
    cloud = assembly.cloud()

    def order(plan: Plan) -> bytes:
        found = assembly.edges()[0].fan_out(plan, cloud.replica)[0]
        return encode(replace(found, updates=updates, snapshot=None))

    updates, tiers = (), LocalEdges(assembly.edges(), Loopback(assembly.devices()))
    for number in range(ORDERS):
        (directory / f"order-{number}").write_bytes(order(cloud.plan().plan))
        updates = (run_round(cloud, tiers).closed.update,)


def infers(directory: Path) -> Callable[[], object]:
    """Plain transformers: the loss of a batch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32).eval()
    token_ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 250 + 3

    def loss() -> object:
        with torch.inference_mode():
            return model(input_ids=token_ids, labels=token_ids, use_cache=False).loss

    return loss


def back_propagates(directory: Path) -> Callable[[], object]:
    """Plain PyTorch: a step of SGD on every weight."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32).eval()
    token_ids, optimizer = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 250 + 3, torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> object:
        optimizer.zero_grad()
        model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
        return optimizer.step()

    return step


def answers(row: str, directory: Path) -> Callable[[], object]:
    """Our device: the first orders, and then for the clock the last one."""
    assembly = assembly_of(row, directory)
    material, config = assembly.material, assembly.config
    device = TorchForward(material.model, material.private, material.shards[0].tolist(), config.activation_mib)

    def start() -> replay.Replica:
        return replay.start(np.load(directory / "theta.npy", mmap_mode="c"), config.optimizer)

    host = Host({0: device}, start, config.optimizer, tuple[()], in_place=row in EVERY)
    *before, last = ((directory / f"order-{number}").read_bytes() for number in range(ORDERS))
    for order in before:
        host.answer(order)
    return lambda: host.answer(last)


def work(row: str, directory: Path) -> None:
    """Does one row's work in this process and prints what it took."""
    torch.set_num_threads(1)
    runs = {INFERENCE: infers, EXACT: back_propagates}
    step = runs[row](directory) if row in runs else answers(row, directory)
    for _ in range(ORDERS - 1 if row in runs else 0):
        step()
    begun_s = time.process_time()
    step()
    print(json.dumps({"cpu_s": time.process_time() - begun_s, "peak_mib": footprint().peak_mib, "dirty_mib": footprint().dirty_mib}))


def measured(row: str, directory: Path, repeats: int) -> dict[str, float]:
    """Runs one row in processes of its own; medians."""
    if row in {*EVERY, LORA}:
        subprocess.run([sys.executable, __file__, "--prepare", row, str(directory)], check=True)
    found = list[dict[str, float]]()
    for _ in range(repeats):
        process = subprocess.run([sys.executable, __file__, "--row", row, str(directory)], check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(process.stdout.splitlines()[-1]))
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def main() -> None:
    """Measures every row and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row or arguments.prepare:
        row, directory = arguments.row or arguments.prepare
        (work if arguments.row else prepare)(row, Path(directory))
        return
    date, lines = datetime.date.today(), list[str]()
    with tempfile.TemporaryDirectory() as name:
        build(Path(name))
        found = {}
        for row in ROWS:
            found[row] = measured(row, Path(name), arguments.repeats)
            print(row, found[row], flush=True)
    inference = found[INFERENCE]
    lines = [
        f"# Every weight of a 125M-parameter decoder, {date}",
        "",
        f"Command: `python benchmarks/memory/every_weight.py --repeats {arguments.repeats}`; {platform.machine()}, one thread, Python "
        f"{platform.python_version()}, torch {torch.__version__}. OPT-125M's shape, random weights, {BATCH} x {TOKENS} tokens, next-token "
        "loss; medians of processes. A row of ours is a device's whole answer: decode the order, make the step of the round before, take "
        "the state's digest, a two-point query, encode the report.",
        "",
        "| row | CPU seconds | / inference | peak MiB | / inference | of it anonymous at the end |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row} | {each['cpu_s']:.2f} | {each['cpu_s'] / inference['cpu_s']:.2f} | {each['peak_mib']:.0f} | "
            f"{each['peak_mib'] / inference['peak_mib']:.3f} | {each['dirty_mib']:.0f} |"
            for row, each in found.items()
        ),
    ]
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"every_weight_{platform.machine()}_{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
