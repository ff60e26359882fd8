"""A device's round on a decoder of 125M or of 1.2B parameters: time and memory against plain inference.

Decoders have the shapes of OPT-125M and Llama-3.2-1B, and random weights: this is about time and memory, not about accuracy. Each row is a
process of its own with one thread. A device answers three orders, the later ones with the step that the cloud has made of the one before;
the third's time is the row's. Where every weight is trained, θ lies in a file that is mapped copy on write. Peak is VmHWM of the process,
imports and mapped weights included.

    python benchmarks/memory/decoders.py --decoder opt-125m
    python benchmarks/memory/decoders.py --decoder llama-1b --repeats 1
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from row_processes import medians

import cooperllm
from cooperllm.algorithm import replay
from cooperllm.assembly import Assembly, Material
from cooperllm.config import (
    AdapterKind,
    ArmConfig,
    ArmName,
    Distribution,
    ModelConfig,
    Objective,
    OptimizerConfig,
    OptimizerKind,
    Partition,
    SourceConfig,
    WeightType,
)
from cooperllm.device import Host
from cooperllm.link.codec import encode
from cooperllm.link.loopback import Loopback
from cooperllm.messages import Plan
from cooperllm.pretrained import tiny_llama
from cooperllm.process_memory import footprint
from cooperllm.round import run_round
from cooperllm.run_directory import RunDirectory
from cooperllm.tiers import LocalEdges

BATCH, TOKENS, ORDERS = 8, 17, 3
INFERENCE, EXACT = "inference", "back-propagation, every weight"
ZEROTH = ArmConfig(name=ArmName.MEZO_FL, queries=1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a device does.

    Attributes:
        arm: Method and its dials.
        adapter: What is trained.
        optimizer: The server's.
        dtype: Of the frozen weights; the decoder's where it is None.
        activation_mib: Memory that both points of a query may share in one pass; None takes one after the other.
    """

    arm: ArmConfig
    adapter: AdapterKind = AdapterKind.LORA
    optimizer: OptimizerKind = OptimizerKind.MOMENTUM
    dtype: WeightType | None = None
    activation_mib: float | None = None


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A shape, and what is tried on it.

    Attributes:
        config: Of transformers.
        dtype: Of the frozen weights.
        rows: By name; beside them plain inference, and for float32 plain back-propagation.
    """

    config: transformers.PretrainedConfig
    dtype: WeightType
    rows: Mapping[str, Row] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Every row's."""
        return (INFERENCE, *self.rows, *([EXACT] if self.dtype is WeightType.FLOAT32 else []))


def every(distribution: Distribution) -> Row:
    """A query along one direction, every weight trained."""
    return Row(arm=replace(ZEROTH, distribution=distribution), adapter=AdapterKind.FULL, optimizer=OptimizerKind.SGD)


DECODERS = {
    "opt-125m": Decoder(
        config=transformers.OPTConfig(
            vocab_size=50272, hidden_size=768, num_hidden_layers=12, ffn_dim=3072, num_attention_heads=12, word_embed_proj_dim=768
        ),
        dtype=WeightType.FLOAT32,
        rows={
            "a query, every weight, signs": every(Distribution.RADEMACHER),
            "a query, every weight, normal numbers": every(Distribution.NORMAL),
            "a query, LoRA r 8": Row(arm=ZEROTH),
            "a query, LoRA r 8, both points in one pass": Row(arm=ZEROTH, activation_mib=1000.0),
            "a query, LoRA r 8, frozen weights in bfloat16": Row(arm=ZEROTH, dtype=WeightType.BFLOAT16),
            "feedback, LoRA r 8": Row(arm=ArmConfig(), optimizer=OptimizerKind.ADAM),
        },
    ),
    "llama-1b": Decoder(
        config=transformers.LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=2048,
        ),
        dtype=WeightType.BFLOAT16,
        rows={
            "measured: five guided queries, LoRA r 8": Row(
                arm=ArmConfig(name=ArmName.MEASURED, basis_size=8, public_batch_size=8), optimizer=OptimizerKind.ADAM
            ),
            "feedback: three local steps, LoRA r 8": Row(arm=ArmConfig(), optimizer=OptimizerKind.ADAM),
        },
    ),
}  # fmt: skip


def build(decoder: Decoder, directory: Path) -> None:
    """Writes the model and some texts of the same length."""
    with torch.random.fork_rng():
        model: Any = transformers.AutoModelForCausalLM.from_config(decoder.config, dtype=getattr(torch, decoder.dtype.value))
    model.save_pretrained(directory / "model")
    tiny_llama(causal=False)[1].save_pretrained(directory / "model")
    texts = [f"text number {number:05d}"[:TOKENS] for number in range(64)]
    (directory / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def assembly_of(decoder: Decoder, row: Row, directory: Path) -> Assembly:
    """Builds the run whose only device is looked at."""
    config = cooperllm.recipe("tiny").config
    model = ModelConfig(
        name=str(directory / "model"),
        objective=Objective.NEXT_TOKEN,
        prompt="{text}",
        max_tokens=TOKENS,
        target_modules=("q_proj", "v_proj"),
        last_layers=None,
        adapter=row.adapter,
        dtype=row.dtype or decoder.dtype,
    )
    source = SourceConfig(name=str(directory / "texts.jsonl"), label_column=None)
    config = replace(
        config,
        model=model,
        data=replace(config.data, public=source, private=source),
        federation=replace(config.federation, num_devices=1, num_edges=1, devices_per_round=1, batch_size=BATCH, partition=Partition.IID),
        optimizer=OptimizerConfig(kind=row.optimizer),
        arm=row.arm,
        activation_mib=row.activation_mib,
    )
    return Assembly(config, RunDirectory(directory / "never-written"), Material(config))


def prepare(assembly: Assembly, directory: Path) -> None:
    """The cloud's part: θ_0 in a file, and a device's three orders with the steps between them."""
    np.save(directory / "theta.npy", assembly.start.theta)
    cloud = assembly.cloud()

    def order(plan: Plan) -> bytes:
        found = assembly.edges()[0].fan_out(plan, cloud.replica)[0]
        return encode(replace(found, updates=updates, snapshot=None))

    updates, tiers, seconds = (), LocalEdges(assembly.edges(), Loopback(assembly.devices())), list[float]()
    for number in range(ORDERS):
        (directory / f"order-{number}").write_bytes(order(cloud.plan().plan))
        begun_s = time.process_time()
        updates = (run_round(cloud, tiers).closed.update,)
        seconds.append(time.process_time() - begun_s)
    print(json.dumps({"cpu_s": statistics.median(seconds), "peak_mib": footprint().peak_mib, "dirty_mib": footprint().dirty_mib}))


def infers(model: Any) -> Callable[[], object]:
    """Plain transformers: the loss of a batch."""
    token_ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 250 + 3

    def loss() -> object:
        with torch.inference_mode():
            return model(input_ids=token_ids, labels=token_ids, use_cache=False).loss

    return loss


def back_propagates(model: Any) -> Callable[[], object]:
    """Plain PyTorch: a step of SGD on every weight."""
    token_ids, optimizer = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 250 + 3, torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> object:
        optimizer.zero_grad()
        model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
        return optimizer.step()

    return step


def answers(assembly: Assembly, directory: Path) -> Callable[[], object]:
    """Our device: the first orders, and then for the clock the last one."""
    is_whole, device = assembly.config.model.adapter is AdapterKind.FULL, assembly.torch_device(0)

    def start() -> replay.Replica:
        theta = np.load(directory / "theta.npy", mmap_mode="c" if is_whole else None)
        return replay.start(theta, assembly.config.optimizer)

    host = Host({0: device}, start, assembly.config.optimizer, tuple[()], in_place=is_whole)
    *before, last = ((directory / f"order-{number}").read_bytes() for number in range(ORDERS))
    for order in before:
        host.answer(order)
    return lambda: host.answer(last)


def work(decoder: Decoder, name: str, directory: Path) -> None:
    """Does one row's work in this process and prints what it took."""
    if name in decoder.rows:
        step = answers(assembly_of(decoder, decoder.rows[name], directory), directory)
    else:
        dtype = getattr(torch, decoder.dtype.value)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=dtype).eval()
        step = infers(model) if name == INFERENCE else back_propagates(model)
        for _ in range(ORDERS - 1):
            step()
    begun_s = time.process_time()
    step()
    print(json.dumps({"cpu_s": time.process_time() - begun_s, "peak_mib": footprint().peak_mib, "dirty_mib": footprint().dirty_mib}))


def measured(part: str, decoder: str, name: str, directory: Path, repeats: int) -> dict[str, float]:
    """Runs one row in processes of its own; medians."""
    return medians([sys.executable, __file__, "--decoder", decoder, part, name, str(directory)], repeats, part, name)


def table(name: str, repeats: int, found: Mapping[str, Mapping[str, float]]) -> str:
    """Writes the results."""
    inference = found[INFERENCE]
    lines = [
        f"# A device's round on {name}, {datetime.date.today()}",
        "",
        f"Command: `python benchmarks/memory/decoders.py --decoder {name} --repeats {repeats}`; {platform.machine()}, one thread, Python "
        f"{platform.python_version()}, torch {torch.__version__}. Random weights in {DECODERS[name].dtype.value}, {BATCH} x {TOKENS} "
        "tokens, next-token loss; medians of processes. A row of ours is a device's whole answer: decode the order, make the step of the "
        "round before, take the state's digest, measure, encode the report. Rows of a whole round have all three tiers in one process.",
        "",
        "| row | CPU seconds | / inference | peak MiB | / inference | anonymous at the end, MiB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row} | {each['cpu_s']:.2f} | {each['cpu_s'] / inference['cpu_s']:.2f} | {each['peak_mib']:.0f} | "
            f"{each['peak_mib'] / inference['peak_mib']:.3f} | {each['dirty_mib']:.0f} |"
            for row, each in found.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures every row and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--decoder", choices=DECODERS, default="opt-125m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="Where the model is written; by default a directory that is removed again.")
    parser.add_argument("--build", type=Path, metavar="DIRECTORY", help="Only write the model there, for other benchmarks.")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--round", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    decoder = DECODERS[arguments.decoder]
    torch.set_num_threads(1)
    if arguments.build:
        build(decoder, arguments.build)
    elif arguments.row:
        work(decoder, arguments.row[0], Path(arguments.row[1]))
    elif arguments.round:
        name, directory = arguments.round
        prepare(assembly_of(decoder, decoder.rows[name], Path(directory)), Path(directory))
    else:
        with tempfile.TemporaryDirectory(dir=arguments.work) as name:
            directory, found = Path(name), {}
            build(decoder, directory)
            for row in decoder.names:
                if row in decoder.rows:
                    found[f"a whole round: {row}"] = measured("--round", arguments.decoder, row, directory, 1)
                found[row] = measured("--row", arguments.decoder, row, directory, arguments.repeats)
        arguments.results.mkdir(parents=True, exist_ok=True)
        file = arguments.results / f"decoder_{arguments.decoder}_{platform.machine()}_{datetime.date.today()}.md"
        file.write_text(table(arguments.decoder, arguments.repeats, found))


if __name__ == "__main__":
    main()
