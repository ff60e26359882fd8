"""What a causal language model is to say after a prompt, as tokens: the same on a device and at the cloud.

    x    = start, prompt, completion, end                                   (1)
    f(θ) = -1/R Σ_b Σ_{t in completion or end} log p_θ(x_bt | x_b,<t)       (2)  R such tokens in a batch: its targets

The prompt is read, not learned. Prompt and completion are tokenised apart, since that is how a model meets them when it is asked: it has
read the prompt before there is a completion.

Dimension key: B examples, T tokens, R targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Int64
from msgspec import Meta

from cooperllm.config import UNLABELLED
from cooperllm.errors import ConfigError

TokenId = Annotated[int, Meta(ge=0, le=1 << 32)]
FewTokens = Annotated[tuple[TokenId, ...], Meta(max_length=64)]

Tokenize = Callable[[str], Sequence[int]]
"""Tokens of a text, nothing put before or behind it."""

Detokenize = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What stands around text and completion.

    Attributes:
        prompt: With {text} and {text2} to be filled in.
        start: Tokens that every sequence of the model begins with.
        end: Tokens that say that a completion is over; learned, too.
    """

    prompt: str
    start: FewTokens
    end: FewTokens

    def prompt_ids(self, tokenize: Tokenize, detokenize: Detokenize, text: str, text2: str, room: int) -> tuple[list[int], bool]:
        """Tokenises a prompt; the texts in it are cut, never what stands around them.

        Args:
            tokenize: Of the model.
            detokenize: Its inverse.
            text: Fills {text}.
            text2: Fills {text2}.
            room: Tokens that the prompt may have, start included.

        Returns:
            (tokens; whether a text was cut).

        Example:
            >>> frame = Frame(prompt="{text}?", start=(9,), end=())
            >>> frame.prompt_ids(lambda text: list(text.encode()), lambda ids: bytes(ids).decode(), "abc", "", 4)
            ([9, 97, 98, 63], True)
        """
        whole = tokenize(self.prompt.format(text=text, text2=text2))
        if len(self.start) + len(whole) <= room:
            return [*self.start, *whole], False
        around = len(self.start) + len(tokenize(self.prompt.format(text="", text2="")))
        texts = [tokenize(one) for one in (text, text2)]
        of_first = max(1, room - around - len(texts[1]), (room - around + 1) // 2) if "{text2}" in self.prompt else max(1, room - around)
        rooms = (of_first, max(0, room - around - min(of_first, len(texts[0]))))
        cut = [detokenize(ids[:most]) for ids, most in zip(texts, rooms, strict=True)]
        ids = [*self.start, *tokenize(self.prompt.format(text=cut[0], text2=cut[1]))]
        return ids[: max(room, 1)], True


@dataclass(kw_only=True, slots=True)
class Encoded:
    """Tokenised texts with what is to be predicted of them: a class each, or the tokens of their completions.

    Attributes:
        token_ids: One row of integers per text.
        labels: Class of each text, shape [N]; -1 where it has none.
        starts: For next tokens: where the first target of each row is, >= 1, shape [N].
        num_cut: Texts that not all of a text or completion found room in, as far as they are counted.
    """

    token_ids: list[Int64[np.ndarray, "_T"]]
    labels: Int64[np.ndarray, "N"]
    starts: Int64[np.ndarray, "N"] | None = None
    num_cut: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def num_targets(self, indices: Sequence[int]) -> int:
        """Counts what is to be predicted in chosen examples, R.

        Example:
            >>> texts = Encoded(token_ids=[np.array([5, 6, 7]), np.array([5, 8])], labels=np.array([0, 1]))
            >>> told = Encoded(token_ids=texts.token_ids, labels=texts.labels, starts=np.array([1, 1]))
            >>> texts.num_targets([0, 1]), told.num_targets([0, 1])
            (2, 3)
        """
        return len(indices) if self.starts is None else sum(len(self.token_ids[index]) - int(self.starts[index]) for index in indices)


def sequences(
    frame: Frame,
    tokenize: Tokenize,
    detokenize: Detokenize,
    texts: Sequence[str],
    second_texts: Sequence[str] | None,
    completions: Sequence[str] | None,
    max_tokens: int,
) -> Encoded:
    """Tokenises prompts and completions, eq. (1).

    Where both do not find room, neither gets more than half of it unless the other leaves it some; a completion that is cut has no end.

    Args:
        frame: What stands around them.
        tokenize: Of the model.
        detokenize: Its inverse.
        texts: Texts, or first texts of pairs.
        second_texts: Second texts of pairs, or None.
        completions: What is to be said; None to learn the texts themselves, without a prompt.
        max_tokens: T at most, >= 2.

    Returns:
        Rows and starts; no text has a label.

    Raises:
        ConfigError: If a text leaves nothing to predict.

    Example:
        >>> read, write = lambda text: list(text.encode()), lambda ids: bytes(ids).decode()
        >>> found = sequences(Frame(prompt="{text}=", start=(), end=(0,)), read, write, ["1+1"], None, ["2"], 8)
        >>> found.token_ids[0].tolist(), found.starts.tolist()
        ([49, 43, 49, 61, 50, 0], [4])
    """
    rows, starts, num_cut = list[Int64[np.ndarray, "_T"]](), list[int](), 0
    for number, text in enumerate(texts):
        said = [*tokenize(text if completions is None else completions[number]), *frame.end]
        if completions is None:
            prompt, is_cut = list(frame.start), False
        else:
            room = max(max_tokens - len(said), (max_tokens + 1) // 2)
            other = "" if second_texts is None else second_texts[number]
            prompt, is_cut = frame.prompt_ids(tokenize, detokenize, text, other, room)
        row = [*prompt, *said]
        start = max(1, len(prompt))  # nothing comes before the first token of all, so that nothing predicts it
        if len(row) <= start:
            said = text if completions is None else completions[number]
            raise ConfigError(
                f"text {number}: found {said!r}, expected something with a token that can be predicted; leave it out, or give the "
                "tokeniser an end of text"
            )
        rows.append(np.array(row[:max_tokens], np.int64))
        starts.append(start)
        num_cut += is_cut or len(row) > max_tokens
    unlabelled = np.full(len(rows), UNLABELLED, np.int64)
    return Encoded(token_ids=rows, labels=unlabelled, starts=np.array(starts, np.int64), num_cut=num_cut)


def targets(
    token_ids: Sequence[Int64[np.ndarray, "_T"]], starts: Sequence[int], firsts: Sequence[int]
) -> tuple[Int64[np.ndarray, "R"], Int64[np.ndarray, "R"]]:
    """Lists the targets of a batch, eq. (2), and where the states stand that predict them.

    Args:
        token_ids: Examples of the batch.
        starts: First target of each.
        firsts: Place of the first token of each, row · T + column.

    Returns:
        (target tokens [R]; their places [R], each one column before its target).

    Example:
        >>> targets([np.array([5, 6, 7]), np.array([5, 8])], [1, 1], [0, 3])
        (array([6, 7, 8]), array([0, 1, 3]))
    """
    tokens = [row[start:] for row, start in zip(token_ids, starts, strict=True)]
    places = [first + np.arange(start - 1, len(row) - 1) for row, start, first in zip(token_ids, starts, firsts, strict=True)]
    return np.concatenate(tokens), np.concatenate(places)


def packed(lengths: Sequence[int]) -> list[list[int]]:
    """Divides examples among rows by first-fit decreasing: the longest first, each in the first row that has room.

    No row is longer than the longest example: longer ones would have more attention than padding to save.

    Args:
        lengths: Tokens of each example, of equal ones the first is first; at least one.

    Returns:
        Positions in `lengths`, row by row.

    Example:
        >>> packed([3, 7, 2, 4, 5])
        [[1], [4, 2], [3, 0]]
    """
    rows, rooms = list[list[int]](), list[int]()
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        length = lengths[position]
        place = next((place for place, room in enumerate(rooms) if room >= length), len(rows))
        if place == len(rows):
            rows.append([])
            rooms.append(max(lengths))
        rows[place].append(position)
        rooms[place] -= length
    return rows
