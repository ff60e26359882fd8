"""Peak memory and time of a device's passes over a vocabulary of 128,256 tokens: scores at once, and in blocks.

A Llama of two layers with random weights, texts of the same length, next-token loss, LoRA on query and value. Each row is a process of its
own with one thread. Peak is VmHWM, set back when the weights have been read, less what is resident then: it holds no weights. The pass runs
twice; the second one is timed.

    python benchmarks/memory/vocabulary.py
"""

import argparse
import datetime
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from row_processes import medians

from cooperllm import models, token_scores
from cooperllm.algorithm import noise
from cooperllm.config import ModelConfig, Objective
from cooperllm.device.torch_forward import TorchForward
from cooperllm.pretrained import tiny_llama
from cooperllm.process_memory import footprint, reset_peak

VOCABULARY, BATCH, TOKENS = 128_256, 8, 64
WIDTHS = (64, 256)
ROWS = {
    "a loss": lambda device, theta: device.evaluate(range(BATCH))[0](theta[None]),
    "four slopes in forward mode": lambda device, theta: device.differentiate(range(BATCH))[0](theta, np.stack([theta] * 4)),
    "a gradient, a layer at a time": lambda device, theta: device.estimate(theta, range(BATCH), None),
    "back-propagation": lambda device, theta: device.train(theta, [range(BATCH)], 0.1),
}


def build(hidden: int, directory: Path) -> None:
    """Writes a model."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.random.fork_rng():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_llama(causal=False)[1].save_pretrained(directory)


def work(row: str, in_blocks: bool, directory: Path) -> None:  # noqa: FBT001 -- a row's own
    """Does one row's work in this process and prints what it took."""
    torch.set_num_threads(1)
    token_scores.WHOLE_MIB = token_scores.WHOLE_MIB if in_blocks else math.inf
    config = ModelConfig(
        name=str(directory), objective=Objective.NEXT_TOKEN, target_modules=("q_proj", "v_proj"), last_layers=None, max_tokens=TOKENS,
        caches_prefix=False,
    )  # fmt: skip
    model = models.load(config, 0)
    theta = model.initial_parameters(0) + np.float32(0.01) * noise.gaussian(1, 0, model.layout.size)
    device = TorchForward(model, model.encode(["x" * TOKENS] * BATCH, None, []), range(BATCH), None)
    sum(float(tensor.sum()) for tensor in model.network.parameters())  # a mapped file is resident once it has been read
    reset_peak()
    resident = footprint().resident_mib
    ROWS[row](device, theta)
    begun_s = time.process_time()
    ROWS[row](device, theta)
    print(json.dumps({"cpu_s": time.process_time() - begun_s, "peak_mib": footprint().peak_mib - resident}))


def main() -> None:
    """Measures every row and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        row, in_blocks, directory = arguments.row
        work(row, in_blocks == "blocks", Path(directory))
        return
    date = datetime.date.today()
    lines = [
        f"# Scores of a large vocabulary, {date}",
        "",
        f"Command: `python benchmarks/memory/vocabulary.py --repeats {arguments.repeats}`; {platform.machine()}, one thread, Python "
        f"{platform.python_version()}, torch {torch.__version__}. {VOCABULARY:,} tokens, batch {BATCH} of {TOKENS} tokens, two layers of "
        f"random weights. MiB above what is resident before the pass, and CPU seconds; medians of {arguments.repeats} processes.",
        "",
        "| pass | hidden size | at once, MiB | in blocks, MiB | at once, s | in blocks, s |",
        "|---|---|---|---|---|---|",
    ]
    for hidden in WIDTHS:
        with tempfile.TemporaryDirectory() as directory:
            build(hidden, Path(directory))
            for row in ROWS:
                found = dict[str, dict[str, float]]()
                for way in ("whole", "blocks"):
                    command = [sys.executable, __file__, "--row", row, way, directory]
                    found[way] = medians(command, arguments.repeats)
                columns = [f"{found[way]['peak_mib']:.0f}" for way in found] + [f"{found[way]['cpu_s']:.2f}" for way in found]
                lines.append(f"| {' | '.join((row, str(hidden), *columns))} |")
                print(lines[-1], flush=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"vocabulary_{platform.machine()}_{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
