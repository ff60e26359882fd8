"""A network of Hugging Face and PEFT, frozen, with what is trained of it seen as one flat vector θ.

A `Model` is a function from (θ, batch) to one score per class, or for next tokens one per token of the vocabulary at each target. θ enters
as views, so the base weights are never copied, written to or perturbed. The frozen layers below the first adapted one see neither θ nor a
perturbation: their output is computed once per example and kept (`Examples.states`), which is what makes long runs affordable on a small
machine.

Dimension key: B examples, T tokens, H hidden size, C classes or tokens of the vocabulary, R targets (B, or tokens), n trained
parameters.
"""

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from safetensors.torch import save_file
from torch import Tensor, nn

from cooperllm.activation_checkpointing import checkpointed
from cooperllm.adapted_layers import AdaptedLayers
from cooperllm.algorithm import noise
from cooperllm.batches import Batch, Examples, batch_of, stacked
from cooperllm.classifiers import LabelTexts, classifier_for
from cooperllm.completion import Frame, packed, sequences
from cooperllm.config import AdapterKind, ModelConfig, Objective, WeightType
from cooperllm.errors import ConfigError
from cooperllm.frozen_prefix import FrozenPrefix, original_layers
from cooperllm.layout import Layout
from cooperllm.pretrained import Telling, adapted, pretrained
from cooperllm.prompts import frame_of
from cooperllm.token_scores import BLOCK_MIB, TokenScores, are_large
from cooperllm.widths import Widths

ROUNDING = {WeightType.FLOAT32: 1e-4, WeightType.NF4: 1e-4, WeightType.FLOAT16: 0.03, WeightType.BFLOAT16: 0.2}
"""What log-probabilities of a text may differ by between a row of its own and one that it shares; positions that go on do more."""

CONTEXT = 1024
"""Tokens that a model which says nothing of its context is given at most."""


class Model:
    """A network as a function of θ; build it with `load`.

    Attributes:
        config: What was asked for.
        layout: Where each trained tensor lies in θ.
        num_classes: C; for next tokens the size of the vocabulary.
        adapted: The layers that a feedback estimate differentiates.
        network: The module, in evaluation mode; what it holds of θ is not what `scores` is asked for.
        prefix: The frozen layers that are computed once per example, or None.
    """

    def __init__(self, config: ModelConfig, network: nn.Module, tokenizer: Any, num_classes: int) -> None:
        self.config = config
        self.num_classes = num_classes
        self.network = network.eval()
        self._tokenizer = tokenizer
        trained = {name: tensor for name, tensor in network.named_parameters() if tensor.requires_grad}
        self.layout = Layout(names=tuple(trained), shapes=tuple(tuple(tensor.shape) for tensor in trained.values()))
        self._trained = trained
        self.adapted = AdaptedLayers(network, self.layout.ranges)
        self.prefix = FrozenPrefix.find(network, self.layout.names) if config.caches_prefix else None

    def initial_parameters(self, seed: int) -> Float32[np.ndarray, "n"]:
        """Returns θ_0: LoRA's first factors drawn from the seed, a zero head, everything else as loaded.

        Args:
            seed: The run's seed.

        Returns:
            θ_0, shape [n].
        """
        parts: list[np.ndarray] = []
        for index, (name, tensor) in enumerate(self._trained.items()):
            values = tensor.detach().float().numpy().reshape(-1)
            if "lora_A" in name:
                drawn = noise.gaussian(seed, index, tensor.numel(), stream=noise.Stream.INITIALISATION)
                values = drawn / np.float32(math.sqrt(tensor.shape[-1]))
            elif name.startswith("classifier."):
                values = np.zeros(tensor.numel(), np.float32)
            parts.append(values)
        return np.concatenate(parts)

    def encode(
        self,
        texts: Sequence[str],
        second_texts: Sequence[str] | None,
        labels: Sequence[int],
        completions: Sequence[str] | None = None,
    ) -> Examples:
        """Tokenises texts, cut at the configured number of tokens.

        Args:
            texts: Texts, or first texts of pairs.
            second_texts: Second texts of pairs, or None.
            labels: Class of each text, in [0, C); for next tokens they do not matter.
            completions: For next tokens: what is to be said; None to learn the texts themselves.

        Returns:
            Examples without states; `batch` adds those when they are first needed.
        """
        if self.config.objective is Objective.NEXT_TOKEN:
            found = sequences(self.frame, self._tokens, self._tokenizer.decode, texts, second_texts, completions, self.config.max_tokens)
            return Examples(token_ids=found.token_ids, labels=found.labels, starts=found.starts, num_cut=found.num_cut)
        if self.config.objective is Objective.LABEL_WORDS:
            token_ids = [self._prompt_ids(text, other) for text, other in zip(texts, second_texts or texts, strict=True)]
        else:
            pairs = {} if second_texts is None else {"text_pair": list(second_texts)}
            cut = pairs | {"truncation": True, "max_length": self.config.max_tokens}
            token_ids = self._tokenizer(list(texts), **cut)["input_ids"] if texts else []  # some tokenisers fail at no texts
        return Examples(token_ids=[np.array(ids, np.int64) for ids in token_ids], labels=np.array(labels, np.int64))

    def batch(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """Pads chosen examples to the longest of them, or lets them share rows of that length; with the output of a frozen prefix.

        Args:
            examples: Where to choose from; missing states are added to it.
            indices: Which examples, at least one.

        Returns:
            The batch.
        """
        lengths = [len(examples.token_ids[index]) for index in indices]
        rows = packed(lengths) if self.config.packing else [[position] for position in range(len(indices))]
        batch = batch_of(examples, indices, rows, self.pad_id)
        if self.prefix is None:
            return batch
        for index in indices:
            if index not in examples.states:
                # Alone, since the last bits depend on what shares a pass: a resumed run must find the states of the first one.
                one = batch_of(examples, [index], [[0]], self.pad_id)
                with torch.no_grad():
                    examples.states[index] = self.prefix.compute(self.network, *self._here(one.given))[0].clone()
        states = stacked([examples.states[index] for index in indices], rows)
        return replace(batch, states=states)

    def loss(self, theta: Float[Tensor, "n"], batch: Batch, labels: Int64[Tensor, "R"] | None = None) -> Float[Tensor, ""]:
        """Evaluates the mean cross entropy at θ; large scores are made in blocks, `token_scores`.

        Args:
            theta: Parameters; not modified.
            batch: Padded examples.
            labels: Other targets than the batch's own, shape [R].

        Returns:
            A scalar, differentiable in θ where autograd is on.
        """
        scores = self._scores(theta, batch)
        (wanted,) = self._here((batch.labels if labels is None else labels,))
        return scores.losses(wanted).mean() if isinstance(scores, TokenScores) else nn.functional.cross_entropy(scores.float(), wanted)

    def judged(self, theta: Float[Tensor, "n"], batch: Batch) -> tuple[int, float]:
        """Compares scores at θ with a batch's targets.

        Args:
            theta: Parameters; not modified.
            batch: Padded examples.

        Returns:
            (targets with the highest score; sum of the targets' losses).
        """
        scores = self._scores(theta, batch)
        (wanted,) = self._here((batch.labels,))
        if isinstance(scores, TokenScores):
            return int((scores.likeliest() == wanted).sum()), float(scores.losses(wanted).sum())
        loss = nn.functional.cross_entropy(scores, wanted, reduction="sum")
        return int((scores.argmax(1) == wanted).sum()), float(loss)

    def scores(self, theta: Float[Tensor, "n"], batch: Batch) -> Float[Tensor, "R C"]:
        """Evaluates the network at θ, where the network is; differentiable in θ where autograd is on.

        Args:
            theta: Parameters; not modified.
            batch: Padded examples.

        Returns:
            One score per class, float32, shape [R, C].
        """
        return self._call(theta, batch)

    def _scores(self, theta: Tensor, batch: Batch) -> Tensor | TokenScores:
        return self._call(theta, batch, **({"in_blocks": True} if self._makes_blocks(batch) else {}))

    def _makes_blocks(self, batch: Batch) -> bool:
        return batch.places is not None and are_large(len(batch.places), self.num_classes)

    def checkpointed(self) -> AbstractContextManager[None]:
        """Within it, a forward pass keeps the inputs of its layers alone; see `activation_checkpointing`."""
        return checkpointed(self.network)

    def activation_mib(self, batch: Batch) -> float:
        """Estimates the memory that one point of a batched pass takes, in MiB; see `Widths`."""
        widths, size = self.widths, batch.token_ids.shape
        if not self._makes_blocks(batch):
            return widths.activation_mib(*size)
        return max(replace(widths, scores=0).activation_mib(*size), 2 * BLOCK_MIB)

    @cached_property
    def frame(self) -> Frame:
        """What stands around a text and its completion, for next tokens."""
        return frame_of(self.config, self._tokenizer)

    @property
    def pad_id(self) -> int:
        """The token that fills up short rows; 0 where the tokeniser has none, since it is masked anyway."""
        pad = self._tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def tokenizer_json(self) -> str:
        """Returns the tokeniser as the library `tokenizers` reads it.

        Returns:
            JSON.

        Raises:
            ConfigError: If it only exists as Python code.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"model.name: the tokeniser of {self.config.name!r} is Python code ({type(self._tokenizer).__name__}), which a device "
                "without that code cannot run; choose a model with a tokenizer.json, or --runtime torch"
            )
        return backend.to_str()

    @property
    def widths(self) -> Widths:
        """How wide the model is."""
        config: Any = self.network.get_submodule("backbone").config
        hidden = int(config.hidden_size)
        return Widths(
            hidden=hidden,
            feed_forward=int(getattr(config, "intermediate_size", None) or 4 * hidden),
            heads=int(config.num_attention_heads),
            scores=self.num_classes if self.config.objective is Objective.NEXT_TOKEN else 0,
        )

    def save_adapter(self, theta: Float32[np.ndarray, "n"], directory: Path, label_names: Sequence[str]) -> None:
        """Writes θ the way PEFT does: `PeftModel.from_pretrained(base, directory)` loads it.

        A head goes to `classifier.safetensors` beside it; a fully trained model is written as an ordinary model directory.

        For label texts `label_embeddings.safetensors` holds one unit row [H] per class, `weight` [C, H]: a class's score is 20 times
        the cosine between its row and the mean last hidden state of a text.

        Args:
            theta: Parameters to save.
            directory: Created where missing.
            label_names: Names of the classes, written to `labels.json` where scores are for classes.
        """
        directory.mkdir(parents=True, exist_ok=True)
        views = self.layout.views(torch.from_numpy(theta.copy()))
        backbone: Any = self.network.get_submodule("backbone")
        with self._at(views):
            backbone.save_pretrained(directory)
        head = {name.removeprefix("classifier."): view.clone() for name, view in views.items() if name.startswith("classifier.")}
        if head:
            save_file(head, directory / "classifier.safetensors")
        if isinstance(self.network, LabelTexts):
            save_file({"weight": self.network.label_embeddings}, directory / "label_embeddings.safetensors")
        self._tokenizer.save_pretrained(directory)
        if label_names and self.config.objective is not Objective.NEXT_TOKEN:
            (directory / "labels.json").write_text(json.dumps(list(label_names)) + "\n", encoding="utf8")

    def say(
        self, theta: Float32[np.ndarray, "n"], text: str, text2: str, tell: Callable[[str], None], *, max_new_tokens: int = 128
    ) -> None:
        """Lets a model of next tokens complete a prompt, always with the likeliest token, so that it says the same every time.

        A prompt that finds no room in the model's context has half of it, or what the answer leaves.

        Args:
            theta: Parameters.
            text: Fills {text} of the prompt.
            text2: Fills {text2}.
            tell: Called with words as they come.
            max_new_tokens: Tokens at most, >= 1.
        """
        room = max(self._context // 2, self._context - max_new_tokens)
        ids, _ = self.frame.prompt_ids(self._tokens, self._tokenizer.decode, text, text2, room)
        with self._at(self.layout.views(torch.from_numpy(theta.copy()))):
            self._generated(ids, max_new_tokens, Telling(self._tokenizer, tell))

    def answers(self, theta: Float32[np.ndarray, "n"], examples: Examples, indices: Sequence[int]) -> list[tuple[str, str]]:
        """Asks a model of next tokens the prompts of examples; an answer twice as long as its completion is cut there.

        Args:
            theta: Parameters.
            examples: With completions.
            indices: Which of them.

        Returns:
            (what was wanted, what was said) for each.
        """
        assert examples.starts is not None, "answers are asked of a model of next tokens"
        found = list[tuple[str, str]]()
        with self._at(self.layout.views(torch.from_numpy(theta.copy()))):
            for index in indices:
                row, start = examples.token_ids[index].tolist(), int(examples.starts[index])
                said = self._generated(row[:start], 2 * (len(row) - start), None)
                found.append((self._words(row[start:]), self._words(said)))
        return found

    @property
    def _context(self) -> int:
        config: Any = self.network.get_submodule("backbone").config
        return getattr(config, "max_position_embeddings", None) or CONTEXT

    def _words(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _generated(self, ids: Sequence[int], most: int, streamer: Any) -> list[int]:
        backbone: Any = self.network.get_submodule("backbone")
        with torch.inference_mode():
            row = backbone.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                streamer=streamer,
                max_new_tokens=min(most, self._context - len(ids)),
                do_sample=False,
                eos_token_id=self.frame.end[0] if self.frame.end else None,
                pad_token_id=self.pad_id,
            )[0]
        return row[len(ids) :].tolist()

    @contextmanager
    def _at(self, views: Mapping[str, Tensor]) -> Generator[None]:
        """Within it, the network looks as it was loaded, and holds these trained tensors."""
        loaded = {name: tensor.detach().clone() for name, tensor in self._trained.items()}
        self.network.load_state_dict(views, strict=False)
        try:
            with original_layers(self.prefix):
                yield
        finally:
            self.network.load_state_dict(loaded, strict=False)  # the next arm's θ_0 is read from them

    def _call(self, theta: Tensor, batch: Batch, **asked: bool) -> Any:
        with torch.enable_grad():  # so that a module may open a graph in the middle of a pass without one
            (here,) = self._here((theta,))
            views = self.layout.views(here)
        with nullcontext() if self.prefix is None or batch.states is None else self.prefix.resumed(batch.states):
            return torch.func.functional_call(self.network, views, self._here(batch.given), asked)

    def _here(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Tensors on the network's device; those that are there already as they are."""
        device = next(self.network.parameters()).device
        return tuple(tensor.to(device) for tensor in tensors)

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompt_ids(self, text: str, other: str) -> list[int]:
        """Cuts the text, never the prompt around it."""
        room = self.config.max_tokens - len(self._tokenizer(self.config.prompt.format(text="", text2=""))["input_ids"])
        parts = [self._tokenizer(part, add_special_tokens=False)["input_ids"][: max(room, 1)] for part in (text, other)]
        cut = [self._tokenizer.decode(part) for part in parts]
        ids: list[int] = self._tokenizer(self.config.prompt.format(text=cut[0], text2=cut[1]))["input_ids"]
        return ids


def load(config: ModelConfig, num_classes: int) -> Model:
    """Loads a model, freezes it and adds what is to be trained.

    Args:
        config: Name, adapter and objective.
        num_classes: C >= 2; for next tokens the vocabulary's size takes its place.

    Returns:
        The model, in evaluation mode, on the CPU; what is trained is float32.

    Raises:
        ConfigError: If the model cannot be found or has no layer that the adapter could attach to.

    Example:
        >>> load(ModelConfig(name="tiny-llama", target_modules=("q_proj", "v_proj"), last_layers=1), 2).layout.size
        962
    """
    is_causal = config.objective in {Objective.LABEL_WORDS, Objective.NEXT_TOKEN}
    if num_classes < 2 and config.objective is not Objective.NEXT_TOKEN:
        raise ConfigError(f"labels: found {num_classes} classes, expected at least 2")
    with torch.random.fork_rng(devices=[]):  # PyTorch and PEFT draw initial values, which θ_0 replaces
        backbone, tokenizer = pretrained(config.name, causal=is_causal, weights=config.dtype)
        backbone.requires_grad_(config.adapter is AdapterKind.FULL)
        if config.objective is Objective.NEXT_TOKEN:
            num_classes = int(backbone.get_output_embeddings().weight.shape[0])
        classifier = classifier_for(config, backbone, tokenizer, num_classes)
        model = Model(config, classifier(adapted(backbone, config)), tokenizer, num_classes)
    if config.packing:
        _check_packing(model)
    return model


def _check_packing(model: Model) -> None:
    """Compares what a model says last of a text behind others in its row, bit for bit, and with what it says of the text alone."""
    most = model.config.max_tokens
    lengths = [most, most - most // 2, most - most // 2, most // 2]  # the last shares a row with either of those before it
    if lengths[-1] < 2:
        return  # no two examples find room in a row
    tokens = (noise.bits(0, 0, sum(lengths), stream=noise.Stream.CHOICE) % np.uint64(model.num_classes)).astype(np.int64)
    rows = np.split(tokens, np.cumsum(lengths)[:-1])
    examples = Examples(token_ids=rows, labels=np.full(4, -1), starts=np.array(lengths) - 1)
    theta, asked = torch.from_numpy(model.initial_parameters(0)), ([0, 1, 3], [0, 2, 3], [3])
    with torch.inference_mode():
        behind, behind_another, alone = (model.scores(theta, model.batch(examples, chosen))[-1].log_softmax(0) for chosen in asked)
    is_apart, furthest = torch.equal(behind, behind_another), float((behind - alone).abs().max())
    if not (is_apart and furthest <= ROUNDING[model.config.dtype]):
        backbone: Any = model.network.get_submodule("backbone")
        raise ConfigError(
            f"model.packing: found true for {model.config.name!r}, whose architecture ({backbone.config.model_type}) does not tell texts "
            f"that share a row apart: log-probabilities are up to {furthest:.2g} from those of a text alone; set model.packing=false"
        )
