"""The model card of an exported adapter: what it was trained on, how, what that cost, and what has left the devices."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from cooperllm.algorithm.baselines import arm
from cooperllm.config import AdapterKind, ArmName, Objective, RunConfig, SourceConfig
from cooperllm.report.table import format_bytes, format_number, format_score
from cooperllm.summary import arm_summary, score

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ adapter }} for `{{ base }}`, trained with [CooperLLM](https://arxiv.org/abs/2601.12917) {{ version }}
on {{ devices }} devices whose texts did not leave them.

| | |
|---|---|
{{ rows }}

## What has left the devices

{{ left }}
Texts and labels stay on the devices. What is sent is derived from them, and no noise is added to it: this is no differential privacy.

## How to use it

```python
{{ usage }}
```

## What it is not

{{ judged }}
The figures above are of the run's held-out texts and one seed. Nothing else was tested, neither for harm nor for other languages or domains
than those of its data.
"""

SENT = {
    ArmName.CLOUD_ONLY: "Nothing: the devices took no part.\n",
    ArmName.FEEDBACK: "The gradient of the adapter over a batch, rounded, and its mean loss, from each device that took part in a round.\n",
    ArmName.FEDAVG_BP: "The change of the adapter after local training, from each device that took part in a round.\n",
}
SLOPES = "Slopes of the loss along a few directions, and its mean, from each device that took part in a round.\n"


def model_card(config: RunConfig, rounds: Sequence[Mapping[str, Any]], label_names: Sequence[str], version: str) -> str:
    """Writes the card of a run's adapter.

    Args:
        config: Settings of the run.
        rounds: Figures of each round so far, oldest first.
        label_names: Names of the classes; empty for next tokens.
        version: Of this package.

    Returns:
        Markdown that begins with metadata as the hub reads them.

    Example:
        >>> next(line for line in model_card(RunConfig(), [], ("bad", "good"), "1").splitlines() if line.startswith("# "))
        '# minilm-feedback-lora'
    """
    model, entry = config.model, arm_summary(config, rounds) if rounds else {}
    is_next_token, is_full = model.objective is Objective.NEXT_TOKEN, model.adapter is AdapterKind.FULL
    base = "sentence-transformers/all-MiniLM-L6-v2" if model.name == "minilm" else model.name
    task = "text-generation" if is_next_token else "text-classification"
    name = f"{base.rstrip('/').rpartition('/')[2] if model.name != 'minilm' else 'minilm'}-{config.arm.name.value}-{model.adapter.value}"
    data = ModelCardData(
        base_model=base,
        library_name="transformers" if is_full else "peft",
        pipeline_tag=task,
        tags=["cooperllm", "federated-learning", config.arm.name.value],
    )
    judged = entry.get("judged_by", "accuracy")
    end = format_score(score(entry, "final_", judged), judged)
    facts = {
        "objective": model.objective.value + (f", classes {', '.join(label_names)}" if label_names and not is_next_token else ""),
        "prompt": f"`{model.prompt!r}`" if is_next_token or model.objective is Objective.LABEL_WORDS else None,
        "private texts (devices)": _source(config.data.private),
        "public texts (cloud)": _source(config.data.public),
        "method": f"{config.arm.name.value}, {config.optimizer.kind.value}, learning rate {config.arm.learning_rate:g}",
        "rounds": f"{len(rounds)} of {config.num_rounds}, {config.federation.devices_per_round} devices each",
        f"{judged} on held-out texts": end,
        "forward passes, all devices": format_number(entry.get("forward_passes")),
        "sent by devices": format_bytes(entry.get("bytes_up")),
        "received by devices": format_bytes(entry.get("bytes_down")),
        "seed": str(config.seed),
    }
    local = arm(config.arm.name).local_training(config.arm) is not None
    left = SENT.get(config.arm.name, SENT[ArmName.FEDAVG_BP] if local else SLOPES)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=name,
        adapter="All weights" if is_full else {AdapterKind.LORA: "A LoRA adapter", AdapterKind.IA3: "An IA3 adapter"}[model.adapter],
        base=base,
        version=version,
        devices=config.federation.num_devices,
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None),
        left=left,
        usage=_usage(config, base),
        judged="Accuracy is the share of texts whose likeliest class is right." if judged == "accuracy" else
        "Loss is the mean negative logarithm of the probability of each token of the completions.",
    )  # fmt: skip
    return str(card)


def _source(source: SourceConfig) -> str:
    return f"`{source.name}`" + (f", at most {source.max_examples} examples" if source.max_examples is not None else "")


def _usage(config: RunConfig, base: str) -> str:
    is_causal = config.model.objective in {Objective.NEXT_TOKEN, Objective.LABEL_WORDS}
    factory = "AutoModelForCausalLM" if is_causal else "AutoModel"
    if config.model.adapter is AdapterKind.FULL:
        return f'from transformers import {factory}\n\nmodel = {factory}.from_pretrained("this directory")'
    return (
        f"from peft import PeftModel\nfrom transformers import {factory}\n\n"
        f'model = PeftModel.from_pretrained({factory}.from_pretrained("{base}"), "this directory")'
    )
