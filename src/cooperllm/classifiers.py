"""How a network gives one score per class: a backbone of Hugging Face, and what reads scores off it.

The names matter elsewhere: `backbone` is what adapters are attached to and saved from, `classifier` a head that is trained.

Dimension key: B examples, T tokens, H hidden size, C classes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cooperllm.config import ModelConfig, Objective
from cooperllm.errors import ConfigError


class PooledClassifier(nn.Module):
    """A backbone, the mean of its last hidden states, and a linear layer: what sentence encoders are made for."""

    def __init__(self, backbone: nn.Module, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(hidden_size, num_classes)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Returns scores [B, C] in float32."""
        hidden = self.backbone(input_ids=token_ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return self.classifier(pooled.float())


class LabelWords(nn.Module):
    """A causal language model whose next-token scores of one word per class, after a prompt, are the class scores."""

    def __init__(self, backbone: nn.Module, word_ids: Sequence[int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("word_ids", torch.tensor(word_ids), persistent=False)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Returns scores [B, C] in float32."""
        scores = self.backbone(input_ids=token_ids, attention_mask=mask, use_cache=False).logits
        last = mask.sum(1) - 1
        return scores[torch.arange(len(last)), last][:, self.word_ids].float()


def classifier_for(config: ModelConfig, backbone: Any, tokenizer: Any, num_classes: int) -> Callable[[nn.Module], nn.Module]:
    """Chooses what reads scores off a backbone; everything that it needs to know is taken from the backbone as it was pretrained.

    Args:
        config: Objective and label words.
        backbone: The pretrained model, before an adapter is attached.
        tokenizer: Its tokeniser.
        num_classes: C >= 2.

    Returns:
        What makes a classifier of the backbone, with or without an adapter.

    Raises:
        ConfigError: If the label words are not one per class, or cannot be told apart.

    Example:
        >>> from cooperllm.models import tiny_llama
        >>> config = ModelConfig(objective=Objective.LABEL_WORDS, label_words=("bad", "good"))
        >>> backbone, tokenizer = tiny_llama(causal=True)
        >>> classifier_for(config, backbone, tokenizer, 2)(backbone)(torch.zeros(3, 4).long(), torch.ones(3, 4).long()).shape
        torch.Size([3, 2])
    """
    if config.objective is Objective.HEAD:
        return partial(PooledClassifier, hidden_size=backbone.config.hidden_size, num_classes=num_classes)
    if len(config.label_words) != num_classes:
        raise ConfigError(f"model.label_words: found {config.label_words}, expected {num_classes} words, one per class")
    return partial(LabelWords, word_ids=_word_ids(tokenizer, config.label_words))


def _word_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The first token of each label word as it follows a prompt, that is, after a space."""
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    first = [row[len(space)] if row[: len(space)] == space and len(row) > len(space) else row[0] for row in ids]
    if len(set(first)) != len(words):
        raise ConfigError(f"model.label_words: {list(words)} begin with the same token; choose words that differ from their first token on")
    return first
