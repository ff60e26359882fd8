"""Prompts and completions as tokens: what is learned, what is cut, and where the states stand that predict it.

Run: pytest tests/unit/test_completion.py
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cooperllm.completion import Frame, sequences, targets
from cooperllm.errors import ConfigError

START, END = 300, 301


def tokenize(text):
    """A token for each letter."""
    return [ord(letter) for letter in text]


def detokenize(ids):
    return "".join(map(chr, ids))


def frame(prompt="{text}?", start=(START,), end=(END,)):
    return Frame(prompt=prompt, start=start, end=end)


def encoded(text, said, max_tokens, second=None, **around):
    found = sequences(frame(**around), tokenize, detokenize, [text], None if second is None else [second], said, max_tokens)
    row, start = found.token_ids[0].tolist(), int(found.starts[0])
    return row[:start], row[start:], found.num_cut


def test_the_prompt_is_read_and_completion_and_end_are_learned():
    assert encoded("why", ["so"], 32) == ([START, *tokenize("why?")], [*tokenize("so"), END], 0)


def test_a_text_that_finds_no_room_is_cut_and_what_stands_around_it_is_not():
    prompt, said, num_cut = encoded("abcdefghij", ["so"], 8, prompt="<{text}>")
    assert (prompt, said, num_cut) == ([START, *tokenize("<ab>")], [*tokenize("so"), END], 1)


def test_a_long_completion_leaves_the_prompt_half_and_has_no_end():
    prompt, said, num_cut = encoded("abcdefghij", ["x" * 99], 10)
    assert (prompt, said, num_cut) == ([START, *tokenize("abc?")], [ord("x")] * 5, 1)


def test_a_long_completion_gets_what_a_short_prompt_leaves():
    assert encoded("a", ["x" * 99], 10) == ([START, *tokenize("a?")], [ord("x")] * 7, 1)


def test_two_texts_share_the_room_and_a_short_one_leaves_the_other_the_rest():
    prompts = [encoded(*texts[:1], [""], 16, second=texts[1], prompt="{text}|{text2}") for texts in (("a" * 99, "b" * 99), ("a", "b" * 99))]
    assert [detokenize(prompt[1:]) for prompt, _, _ in prompts] == ["aaaaaaa|bbbbbb", "a|bbbbbbbbbbbb"]


def test_without_completions_the_texts_themselves_are_learned_but_for_a_first_token_that_nothing_predicts():
    assert encoded("why", None, 32) == ([START], [*tokenize("why"), END], 0)
    assert encoded("why", None, 32, start=()) == (tokenize("w"), [*tokenize("hy"), END], 0)


@pytest.mark.parametrize(("text", "said", "start"), [("why", [""], ()), ("w", None, ()), ("", None, (START,))])
def test_a_text_that_leaves_nothing_to_predict_is_refused_with_its_number(text, said, start):
    with pytest.raises(ConfigError, match=r"text 0: found .* expected something with a token that can be predicted"):
        encoded(text, said, 32, start=start, end=())


texts = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=40)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.integers(4, 60))
def test_every_target_is_the_token_behind_its_place_and_no_row_is_too_long(rows, max_tokens):
    """Read back from a padded batch, as a network sees it."""
    found = sequences(frame(), tokenize, detokenize, [text for text, _ in rows], None, [said for _, said in rows], max_tokens)
    width = max(map(len, found.token_ids)) + 2
    padded = np.full((len(rows), width), -1)
    for number, row in enumerate(found.token_ids):
        padded[number, : len(row)] = row
    tokens, places = targets(found.token_ids, found.starts.tolist(), range(0, len(rows) * width, width))
    assert width - 2 <= max_tokens
    np.testing.assert_array_equal(padded.reshape(-1)[places + 1], tokens)
    assert len(tokens) == found.num_targets(range(len(rows)))
    assert found.num_cut == sum(len(text) + len(said) + 3 > max_tokens for text, said in rows)  # start, question mark, end
    for number, (_, said) in enumerate(rows):
        own = [token for token, place in zip(tokens.tolist(), places.tolist(), strict=True) if place // width == number]
        assert own
        assert ([*tokenize(said), END])[: len(own)] == own
