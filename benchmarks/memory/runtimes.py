"""Peak memory and processor time of a device's work against named baselines, each row in a process of its own.

Baselines are PyTorch loops as anybody would write them: back-propagation through all parameters or through LoRA with AdamW, the latter with
gradient checkpointing or one text at a time. Ours: slopes and feedback estimates with PyTorch, and from device packages, every variant, in
processes that never load PyTorch. A row's peak is VmHWM, absolute and over what its process held after imports; what a row compares with
is said in the table. The decoder has random weights: memory and time do not mind.

    python benchmarks/memory/runtimes.py --work runs/memory
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cooperllm.algorithm import noise, zeroth_order
from cooperllm.config import AdapterKind, ModelConfig, Objective, Variant
from cooperllm.process_memory import footprint

SEED, SCALE = 5, 1e-2
TORCH_ROWS = (
    "full BP, AdamW",
    "LoRA BP, AdamW",
    "LoRA BP, checkpointed",
    "LoRA BP, one text at a time",
    "PyTorch inference",
    "PyTorch slopes",
    "PyTorch estimate",
)
ONNX_WORK = ("inference", "slopes", "estimate")


class Setting(NamedTuple):
    """What a device runs on.

    Attributes:
        model: "minilm", or "decoder": 12 layers of 768, 32,000 words, 124 million parameters.
        batch_size: Texts.
        num_tokens: Of every text.
        last_layers: How many of the last layers are adapted; None for all. What lies below is computed once per text.
    """

    model: str
    batch_size: int
    num_tokens: int
    last_layers: int | None


SETTINGS = (
    Setting("minilm", 16, 64, None),
    Setting("minilm", 1, 64, None),
    Setting("minilm", 16, 64, 2),
    Setting("decoder", 8, 128, None),
    Setting("decoder", 1, 128, None),
    Setting("decoder", 8, 128, 2),
)


def main() -> None:
    """Measures every row of every setting and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/memory"), help="where the decoder and packages are written; kept between runs"
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--settings", type=int, nargs="+", default=list(range(len(SETTINGS))), help="positions in SETTINGS")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--package", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--decoder", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        measure(SETTINGS[int(arguments.row[1])], arguments.row[0], arguments.work)
    elif arguments.package:
        write(SETTINGS[int(arguments.package[1])], Variant(arguments.package[0]), arguments.work)
    elif arguments.decoder:
        write_decoder(arguments.work / "decoder")
    else:
        report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Runs rows in processes of their own, prints them as they come, and writes the table at the end."""
    date, lines = datetime.date.today(), list[str]()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not (arguments.work / "decoder").exists():
        child(["--decoder"], arguments.work)
    rows = [*TORCH_ROWS, *(f"{variant.value} {work}" for variant in Variant for work in ONNX_WORK)]
    for number in arguments.settings:
        setting, peaks = SETTINGS[number], dict[str, float]()
        where = "all layers adapted" if setting.last_layers is None else f"the last {setting.last_layers} layers adapted, prefix cached"
        lines += [
            "",
            f"## {setting.model}, {setting.batch_size} x {setting.num_tokens} tokens, {where}",
            "",
            "| row | peak over imports, MiB | absolute | dirty / files | CPU ms | below full BP | below LoRA BP | below one by one |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            found = child(["--row", row, str(number)], arguments.work)
            peaks[row] = found["over_imports_mib"]
            below = (f"{1 - peaks[row] / peaks[other]:.0%}" for other in (TORCH_ROWS[0], TORCH_ROWS[1], TORCH_ROWS[3]) if other in peaks)
            lines.append(
                f"| {row} | {peaks[row]:.0f} | {found['absolute_mib']:.0f} | {found['dirty_mib']:.0f} / {found['files_mib']:.0f} | "
                f"{1e3 * found['cpu_s']:.0f} | {' | '.join([*below, '', '', ''][:3])} |"
            )
            print(lines[-1], flush=True)
    head = [
        f"# Memory and time of a device's work, {date}",
        "",
        f"Command: `python benchmarks/memory/runtimes.py`; {platform.machine()}, one thread, Python {platform.python_version()}.",
        "LoRA r 8 on query and value; texts of the greatest length; label words (decoder) or a head (MiniLM). CPU time is that of one",
        "training step, one two-point query on the whole batch, one estimate, or one loss (inference): the least of three.",
    ]
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"memory_runtimes_{platform.machine()}_{date}.md").write_text("\n".join([*head, *lines]) + "\n")


def child(words: list[str], work: Path) -> dict[str, float]:
    """Runs this file in a process of its own, one thread, and reads its last line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--work", str(work), *words]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def model_config(setting: Setting, work: Path, adapter: AdapterKind = AdapterKind.LORA) -> ModelConfig:
    """Describes a setting's model."""
    if setting.model == "minilm":
        return ModelConfig(adapter=adapter, last_layers=setting.last_layers, max_tokens=setting.num_tokens)
    return ModelConfig(
        name=str(work / "decoder"), adapter=adapter, objective=Objective.LABEL_WORDS, label_words=("bad", "good"), prompt="{text} It was",
        target_modules=("q_proj", "v_proj"), last_layers=setting.last_layers, max_tokens=setting.num_tokens,
    )  # fmt: skip


def texts_of(setting: Setting) -> list[str]:
    """Texts that are longer than the setting allows, no two alike."""
    from cooperllm.reviews import generate  # noqa: PLC0415 -- after the memory of imports has been read

    reviews = [review.text for review in generate(("film", "book"), 40 * setting.batch_size, seed=SEED)]
    return [" ".join(reviews[40 * number : 40 * (number + 1)]) for number in range(setting.batch_size)]


def measure(setting: Setting, row: str, work: Path) -> None:
    """Does one row's work in this process and prints its memory and time."""
    step, repeats, imported_mib = (torch_step if row in TORCH_ROWS else onnx_step)(setting, row, work)
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    held = footprint()
    print(json.dumps({
        "over_imports_mib": held.peak_mib - imported_mib, "absolute_mib": held.peak_mib, "dirty_mib": held.dirty_mib,
        "files_mib": held.mapped_mib, "cpu_s": min(seconds),
    }))  # fmt: skip


def torch_step(setting: Setting, row: str, work: Path) -> tuple[Callable[[], object], int, float]:
    """A baseline, or our work with PyTorch: (one step, how often, memory after imports)."""
    import torch  # noqa: PLC0415 -- rows of packages must not load it

    from cooperllm import models, pretrained  # noqa: PLC0415
    from cooperllm.device.torch_forward import TorchForward  # noqa: PLC0415

    imported_mib = footprint().resident_mib
    pretrained.hush()
    is_full = row == TORCH_ROWS[0]
    model = models.load(model_config(setting, work, AdapterKind.FULL if is_full else AdapterKind.LORA), 2)
    examples = model.encode(texts_of(setting), None, [number % 2 for number in range(setting.batch_size)])
    everything = range(setting.batch_size)
    if row.startswith("PyTorch"):
        device = TorchForward(model, examples, everything, None)
        return work_of(row.split()[1], device, model.initial_parameters(SEED)), 3, imported_mib
    cross_entropy = torch.nn.functional.cross_entropy
    if is_full:
        network = model.network
        parameters = [tensor for tensor in network.parameters() if tensor.requires_grad]
        network.train(mode=False)

        def scores(batch: Any) -> Any:
            return network(batch.token_ids, batch.mask)

    else:
        parameters = [torch.from_numpy(model.initial_parameters(SEED)).requires_grad_()]

        def scores(batch: Any) -> Any:
            return model.scores(parameters[0], batch)

    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    parts = [[index] for index in everything] if row == TORCH_ROWS[3] else [list(everything)]
    around = model.checkpointed if row == TORCH_ROWS[2] else contextlib.nullcontext

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part in parts:
            batch = model.batch(examples, part)
            with around():
                loss = cross_entropy(scores(batch).float(), batch.labels) * (len(part) / len(everything))
            loss.backward()
        optimizer.step()

    return step, 3, imported_mib


def onnx_step(setting: Setting, row: str, work: Path) -> tuple[Callable[[], object], int, float]:
    """Our work from a device package: (one step, how often, memory after imports)."""
    from cooperllm.device.graphs import loader  # noqa: PLC0415 -- rows of PyTorch must not load another runtime
    from cooperllm.device.onnx_forward import OnnxForward, open_package  # noqa: PLC0415 -- the same
    from cooperllm.device.settings import GraphLibrary  # noqa: PLC0415 -- the same

    loader(GraphLibrary.ONNX_RUNTIME)  # which imports it
    name, _, kind = row.rpartition(" ")
    path = package_of(setting, Variant(name), work)
    if not path.exists():
        child(["--package", name, str(SETTINGS.index(setting))], work)
    imported_mib = footprint().resident_mib
    package = open_package(path)
    examples = package.encode(texts_of(setting), None, [number % 2 for number in range(setting.batch_size)])
    device = OnnxForward(package, examples, range(setting.batch_size), None)
    device.prepare()
    assert "torch" not in sys.modules, "a device has loaded PyTorch"
    return work_of(kind, device, package.theta), 3, imported_mib


def work_of(kind: str, device: Any, theta: np.ndarray) -> Callable[[], object]:
    """What a device does in a row: one loss, a two-point query, or an estimate."""
    chosen = range(device.num_examples)
    if kind == "inference":
        return lambda: device.evaluate(chosen)[0](theta[None])
    if kind == "slopes":
        directions = [noise.gaussian(SEED, 0, len(theta))]
        return lambda: zeroth_order.slopes(device.evaluate(chosen)[0], theta, directions, SCALE, points_per_pass=1)
    return lambda: device.estimate(theta, chosen, None)


def package_of(setting: Setting, variant: Variant, work: Path) -> Path:
    """Where a setting's package is; settings that differ in their batches share one."""
    return work / f"{setting.model}-{setting.num_tokens}-{setting.last_layers or 'all'}-{variant.value}"


def write(setting: Setting, variant: Variant, work: Path) -> None:
    """Writes a package, in a process of its own that loads PyTorch, and the decoder where it is not there yet."""
    from cooperllm import models, pretrained  # noqa: PLC0415
    from cooperllm.packaging import write_package  # noqa: PLC0415

    pretrained.hush()
    model = models.load(model_config(setting, work), 2)
    path = package_of(setting, variant, work)
    write_package(model, model.initial_parameters(SEED), path, label_names=("bad", "good"), variant=variant, seed=SEED)
    print(json.dumps({"bytes": float(sum(file.stat().st_size for file in path.iterdir()))}))


def write_decoder(path: Path) -> None:
    """Writes a Llama of random weights and a tokeniser trained on generated reviews: few words, but frequent ones come first as in any."""
    import torch  # noqa: PLC0415 -- rows of packages must not load it
    import transformers  # noqa: PLC0415
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    from cooperllm.reviews import generate  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([review.text for review in generate(("film", "book", "hotel"), 20_000, seed=SEED)], trainer)
    shape = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2560, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(shape)
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(part)
    part.replace(path)
    print(json.dumps({"parameters": float(sum(tensor.numel() for tensor in model.parameters()))}))


if __name__ == "__main__":
    main()
