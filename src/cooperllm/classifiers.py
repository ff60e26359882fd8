"""How a network gives scores, one per class or per token: a backbone of Hugging Face, and what reads scores off it.

The names matter elsewhere: `backbone` is what adapters are attached to and saved from, `classifier` a head that is trained.

References:
    Zhao et al., 2021, Calibrate before use: improving few-shot performance of language models, arXiv:2102.09690, section 4.2.
    Reimers and Gurevych, 2019, Sentence-BERT: sentence embeddings using Siamese BERT-networks, arXiv:1908.10084.

Dimension key: B examples, T tokens, H hidden size, C classes, V tokens of the vocabulary, R targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cooperllm.config import ModelConfig, Objective
from cooperllm.errors import ConfigError
from cooperllm.frozen_prefix import layer_stack
from cooperllm.token_scores import TokenScores
from cooperllm.wrapped_forward import forward_wrapped

CONTENT_FREE = ("N/A", "[MASK]", "")
"""What stands in the place of a text when a model is asked what it says of none; the mean of its scores is taken."""

SCALE = 20.0
"""Of cosines as scores: what sentence encoders are trained with, the default of MultipleNegativesRankingLoss in sentence-transformers."""


class PooledClassifier(nn.Module):
    """A backbone, the mean of its last hidden states, and a linear layer: what sentence encoders are made for."""

    def __init__(self, backbone: nn.Module, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(hidden_size, num_classes)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Returns scores [B, C] in float32."""
        return self.classifier(_mean_state(self.backbone, token_ids, mask))


class LabelWords(nn.Module):
    """A causal language model whose next-token scores of one word per class, after a prompt, are the class scores.

    The output layer is asked for these words after the last token alone: scores of a whole vocabulary for every token would be the widest
    thing in memory.
    """

    word_ids: Tensor
    shift: Tensor | None

    def __init__(self, backbone: nn.Module, word_ids: Sequence[int], shift: Tensor | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("word_ids", torch.tensor(word_ids), persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Returns scores [B, C] in float32."""
        language_model: Any = self.backbone
        head = language_model.get_output_embeddings()
        with forward_wrapped(head, partial(self._after_last_token, head, mask.sum(1) - 1)):
            scores = language_model(input_ids=token_ids, attention_mask=mask, use_cache=False).logits.float()
        return scores if self.shift is None else scores - self.shift

    def _after_last_token(self, head: nn.Module, last: Tensor, own: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        at_last = hidden[torch.arange(last.shape[0]), last]
        if type(head) is not nn.Linear:  # an adapter's layer, say
            return own(at_last)[:, self.word_ids]
        scores = at_last.float() @ head.weight[self.word_ids].float().T
        return scores if getattr(head, "bias", None) is None else scores + head.bias[self.word_ids].float()


class NextTokens(nn.Module):
    """A causal language model's scores of the whole vocabulary, where the next token of a completion is asked for and nowhere else."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self._treats_tokens_alike: bool | None = None

    def forward(
        self, token_ids: Tensor, mask: Tensor, places: Tensor, positions: Tensor | None = None, *, in_blocks: bool = False
    ) -> Tensor | TokenScores:
        """Returns scores [R, V] in float32 at places [R], row · T + column of the token before, or what they are made of.

        Where examples share rows there are positions [B, T], which begin at 0 in each. Given these and no mask, `transformers` tells the
        examples apart.
        """
        language_model: Any = self.backbone
        head = language_model.get_output_embeddings()
        whose = {"attention_mask": mask} if positions is None else {"position_ids": positions}
        given = {"input_ids": token_ids, "use_cache": False, **whose}
        found = self._in_blocks(head, given, places) if in_blocks else None
        if found is not None:
            return found

        def at_places(own: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            return own(hidden.flatten(0, 1)[places])

        with forward_wrapped(head, at_places):
            return language_model(**given).logits.float()

    def _in_blocks(self, head: nn.Module, given: dict[str, Any], places: Tensor) -> TokenScores | None:
        """Runs all but the output layer; what the model does to scores behind that layer is asked of the model, without its body.

        None where a score's fate there depends on its token, so that only a whole row is right, or where body or head are of another kind.
        """
        language_model: Any = self.backbone
        stack = layer_stack(self)
        if type(head) is not nn.Linear or stack is None or self._treats_tokens_alike is False:
            return None
        body = self.get_submodule(stack[0].rpartition(".")[0])
        states, ends = list[Tensor](), list[Any]()

        def read(_own: Any, hidden: Tensor) -> Tensor:
            states.append(hidden.flatten(0, 1)[places])
            return hidden.new_zeros(1, head.weight.shape[0])

        def run(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            ends.append(own(*args, **kwargs))
            return ends[0]

        def finish(scores: Tensor) -> Tensor:
            with forward_wrapped(head, lambda *_: scores), forward_wrapped(body, lambda *_, **__: end):
                return language_model(input_ids=given["input_ids"][:1, :1], use_cache=False).logits

        with forward_wrapped(head, read), forward_wrapped(body, run):
            language_model(**given)
        end = replace(ends[0], last_hidden_state=torch.zeros_like(ends[0].last_hidden_state[:1, :1]))
        if self._treats_tokens_alike is None:
            self._treats_tokens_alike = _is_for_each(finish, head.weight.shape[0])
        return TokenScores(states=states[0], weight=head.weight, bias=head.bias, finish=finish) if self._treats_tokens_alike else None


class LabelTexts(nn.Module):
    """A backbone whose mean last hidden state is compared with that of one text per class; nothing of it is a head that could be trained.

    Attributes:
        label_embeddings: Mean last hidden states of the classes' texts under the pretrained backbone, as unit rows [C, H]; fixed.
    """

    label_embeddings: Tensor

    def __init__(self, backbone: nn.Module, label_embeddings: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("label_embeddings", label_embeddings, persistent=False)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Returns scores [B, C] in float32: `SCALE` times cosines."""
        pooled = _mean_state(self.backbone, token_ids, mask)
        return SCALE * nn.functional.normalize(pooled, dim=1) @ self.label_embeddings.T


def classifier_for(config: ModelConfig, backbone: Any, tokenizer: Any, num_classes: int) -> Callable[[nn.Module], nn.Module]:
    """Chooses what reads scores off a backbone; everything that it needs to know is taken from the backbone as it was pretrained.

    Args:
        config: Objective, and the words or texts of the classes.
        backbone: The pretrained model, before an adapter is attached.
        tokenizer: Its tokeniser.
        num_classes: C >= 2; for next tokens it does not matter.

    Returns:
        What makes a classifier of the backbone, with or without an adapter.

    Raises:
        ConfigError: If the words or texts are not one per class, or cannot be told apart.

    Example:
        >>> from cooperllm.pretrained import tiny_llama
        >>> config = ModelConfig(objective=Objective.LABEL_WORDS, label_words=("bad", "good"))
        >>> backbone, tokenizer = tiny_llama(causal=True)
        >>> classifier_for(config, backbone, tokenizer, 2)(backbone)(torch.zeros(3, 4).long(), torch.ones(3, 4).long()).shape
        torch.Size([3, 2])
    """
    if config.objective is Objective.HEAD:
        return partial(PooledClassifier, hidden_size=backbone.config.hidden_size, num_classes=num_classes)
    if config.objective is Objective.NEXT_TOKEN:
        return NextTokens
    if len(config.label_words) != num_classes:
        raise ConfigError(f"model.label_words: found {config.label_words}, expected {num_classes} words, one per class")
    if config.objective is Objective.LABEL_TEXTS:
        return partial(LabelTexts, label_embeddings=_label_embeddings(config, backbone, tokenizer))
    word_ids = _word_ids(tokenizer, config.prompt, config.label_words)
    shift = _said_of_no_text(config.prompt, LabelWords(backbone, word_ids), tokenizer) if config.calibrates else None
    return partial(LabelWords, word_ids=word_ids, shift=shift)


def _is_for_each(finish: Callable[[Tensor], Tensor], num_tokens: int) -> bool:
    """Whether scores of some tokens come out as they do among all."""
    scores = torch.linspace(-30, 30, num_tokens)[None]
    try:
        parts = torch.cat([finish(part) for part in scores.split(1 + num_tokens // 3, 1)], 1)
    except (RuntimeError, IndexError):  # something of the vocabulary's size is added, or tokens are named
        return False
    return bool(torch.isclose(parts, finish(scores), rtol=1e-6, atol=1e-6).all())


def _mean_state(backbone: nn.Module, token_ids: Tensor, mask: Tensor) -> Tensor:
    """The mean of the last hidden states [B, H] in float32."""
    config: Any = backbone.config
    # A layer that runs once more would find its own keys in a cache, and attend to them.
    without_cache = {"use_cache": False} if getattr(config, "use_cache", False) else {}
    hidden = backbone(input_ids=token_ids, attention_mask=mask, **without_cache).last_hidden_state.float()
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _label_embeddings(config: ModelConfig, backbone: nn.Module, tokenizer: Any) -> Tensor:
    """One unit row per class; each text goes through the backbone alone, so that no row depends on the others."""
    rows: list[list[int]] = tokenizer(list(config.label_words), truncation=True, max_length=config.max_tokens)["input_ids"]
    if len({tuple(row) for row in rows}) != len(rows):
        raise ConfigError(
            f"model.label_words: found {config.label_words}, expected texts that differ within their first {config.max_tokens} tokens: "
            "two of these are the same to the model; say what sets these classes apart"
        )
    with torch.no_grad():
        states = [_mean_state(backbone, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64)) for row in rows]
        return nn.functional.normalize(torch.cat(states), dim=1)


def _said_of_no_text(prompt: str, classifier: LabelWords, tokenizer: Any) -> Tensor:
    """The mean scores of prompts without a text, each alone."""
    rows: list[list[int]] = [tokenizer(prompt.format(text=text, text2=text))["input_ids"] for text in CONTENT_FREE]
    with torch.no_grad():
        scores = [classifier(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64)) for row in rows]
    return torch.cat(scores).mean(0)


def _word_ids(tokenizer: Any, prompt: str, words: Sequence[str]) -> list[int]:
    """The first token of each label word as it stands behind the prompt; one that is only the space between them does not count."""
    before = prompt.format(text="a", text2="a")
    gap = "" if before[-1:].isspace() else " "
    read: list[list[int]] = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, *(before + gap + w for w in words))
    ]
    first = list[int]()
    for row in read[1:]:
        same = next((place for place, (one, other) in enumerate(zip(read[0], row, strict=False)) if one != other), len(read[0]))
        told = [token for token in row[same:] if tokenizer.decode([token]).strip()]
        first.append((told or row[-1:])[0])
    if len(set(first)) != len(words):
        raise ConfigError(f"model.label_words: {list(words)} begin with the same token; choose words that differ from their first token on")
    return first
