"""Builds a small causal language model from nothing, for benchmarks that need one and have no hub: next tokens of unlabelled texts.

A Llama of 1.3 million parameters and a vocabulary of 4,096 pieces, both made from the training texts of the data sets named; labels are
never read. What it learns is which words go together, and hardly more: it is for comparing methods, not for using.

    python benchmarks/convergence/pretrain.py --data-directory ../shared/data --out runs/small-llama
"""

import argparse
import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from rich.progress import track

from cooperllm.algorithm import noise

SETS = ("imdb", "amazon_multi", "uci_yelp", "uci_amazon_cells", "customer_reviews", "ag_news")
"""Not sst2 and not rte: they are what devices keep to themselves."""

VOCABULARY, LENGTH, BATCH, STEPS, RATE = 4096, 128, 16, 2500, 3e-3
ORDER = 1 << 32
"""Noise index of the order of texts; the steps have those after it."""


def texts_of(directory: Path, sets: tuple[str, ...]) -> list[str]:
    """Reads every training text."""
    return [
        json.loads(line)["text"] for name in sets for line in (directory / name / "train.jsonl").read_text(encoding="utf8").splitlines()
    ]


def tokenizer_of(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Learns byte-level pieces."""
    found = tokenizers.ByteLevelBPETokenizer()
    found.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def pretrained(texts: list[str], tokenizer: transformers.PreTrainedTokenizerFast, steps: int, seed: int) -> transformers.LlamaForCausalLM:
    """Back-propagates next tokens of texts laid end to end, drawn at random places."""
    tokens = [
        token for index in noise.permutation(seed, ORDER, len(texts)) for token in (*tokenizer.encode(texts[index]), tokenizer.eos_token_id)
    ]
    stream = torch.tensor(tokens)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for index, (name, tensor) in enumerate(model.named_parameters()):
            if "norm" not in name:
                drawn = noise.gaussian(seed, index, tensor.numel(), stream=noise.Stream.INITIALISATION)
                tensor.copy_(torch.from_numpy(drawn).view(tensor.shape) * 0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    losses = list[float]()
    for step in track(range(steps), description="pretraining"):
        starts = noise.bits(seed, ORDER + 1 + step, BATCH, stream=noise.Stream.CHOICE) % np.uint64(len(stream) - LENGTH)
        batch = torch.stack([stream[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    print(f"{len(stream)} tokens; loss {np.mean(losses[:20]):.2f} at first, {np.mean(losses[-100:]):.2f} at last")
    return model


def main() -> None:
    """Writes the model and its tokeniser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-directory", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/small-llama"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    texts = texts_of(arguments.data_directory, SETS)
    tokenizer = tokenizer_of(texts)
    pretrained(texts, tokenizer, arguments.steps, arguments.seed).eval().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
