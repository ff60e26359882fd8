"""The embedded review generator: determinism, balance, grammar, and words that change sides.

Run: pytest tests/unit/test_reviews.py
"""

import re
from functools import cache

import pytest

from cooperllm.errors import ConfigError
from cooperllm.reviews import DOMAINS, LABEL_NAMES, PRIVATE_DOMAINS, PUBLIC_DOMAINS, Review, generate

GOLDEN = [
    (1, "On a rainy hike, this new camera never missed a smile, and the focus motor was excellent."),
    (0, "On the train, this handset was full of twists, and the home page was a let-down."),
    (0, "Before a dinner party, the handle was fairly firm, but the timer was very lively."),
    (1, "In a packed cinema, the prologue was unusually short, even though the camera work was a little cold."),
    (0, "In one weekend, the last chapter was far too predictable, even though the descriptions were quite short."),
    (1, "The bathrobes were slightly thin, but the check-in was better than average."),
    (0, "On a Friday night, the desserts were far too small, even though the dining room was fairly lively."),
    (1, "After a missed connection, the transfer was excellent, and the aisle was wonderfully roomy."),
]
"""generate(DOMAINS, 8, seed=2026): a change of words is a change of every curve drawn from them, and must be on purpose."""


@cache
def sample() -> tuple[Review, ...]:
    return tuple(generate(DOMAINS, 6000, seed=1))


def positive_share(domain: str, words: str) -> float:
    labels = [review.label for review in sample() if review.domain == domain and words in review.text]
    assert len(labels) >= 10, f"{words!r} is too rare in {domain} to say anything"
    return sum(labels) / len(labels)


def test_golden_sentences_of_a_seed():
    assert [(review.label, review.text) for review in generate(DOMAINS, 8, seed=2026)] == GOLDEN


def test_sentence_does_not_depend_on_how_many_are_asked_for():
    assert generate(DOMAINS, 400, seed=5)[:37] == generate(DOMAINS, 37, seed=5)


def test_sentence_does_not_depend_on_the_domains_beside_it():
    together = [review for review in generate(("hotel", "film"), 40, seed=5) if review.domain == "film"]
    assert together == generate(["film"], 20, seed=5)


def test_another_seed_writes_other_sentences():
    first, second = ({review.text for review in generate(DOMAINS, 300, seed=seed)} for seed in (1, 2))
    assert len(first & second) < 0.05 * 300


def test_domains_are_dealt_in_turn():
    assert [review.domain for review in generate(("book", "phone"), 5, seed=0)] == ["book", "phone", "book", "phone", "book"]


def test_public_and_private_domains_are_disjoint_and_complete():
    assert not set(PUBLIC_DOMAINS) & set(PRIVATE_DOMAINS)
    assert PUBLIC_DOMAINS + PRIVATE_DOMAINS == DOMAINS


@pytest.mark.parametrize("domain", DOMAINS)
def test_labels_are_balanced(domain: str):
    labels = [review.label for review in generate([domain], 100, seed=9)]
    assert all(sorted(labels[i : i + 2]) == [0, 1] for i in range(0, 100, 2))
    # 50 even places with a fair coin each: 25 positive, standard deviation 3.5; parity would give 0 or 50.
    assert 10 < sum(labels[::2]) < 40
    assert set(labels) == set(range(len(LABEL_NAMES)))


@pytest.mark.parametrize("domains", [DOMAINS, ("film",)], ids=["all domains", "one domain"])
def test_fewer_than_two_percent_are_duplicates(domains: tuple[str, ...]):
    assert len({review.text for review in generate(domains, 3000, seed=1)}) > 0.98 * 3000


def test_sentences_are_short():
    assert all(8 <= len(review.text.split()) <= 25 for review in sample())


def test_sentences_start_with_a_capital_and_end_with_a_full_stop():
    assert all(re.fullmatch(r"[A-Z][a-zA-Z ,:-]+[a-z]\.", review.text) for review in sample())


def test_verbs_agree_with_their_subjects():
    pairs = [pair for review in sample() for pair in re.findall(r"\b(\w+) (was|were)\b", review.text)]
    assert len(pairs) > 3000
    assert not [pair for pair in pairs if pair[0].endswith("s") != (pair[1] == "were")]
    # The generator tells a plural by its s, so no singular word in s may become a subject: focus, bass, lens, mattress, hostess.
    assert not {noun for noun, _ in pairs if re.search(r"(us|ss|is|lens)$", noun)} - {"menus"}


def test_no_word_is_stressed_twice_in_a_row():
    assert not [review.text for review in sample() if re.search(r"\b(\w+) \1\b", review.text)]


@pytest.mark.parametrize(
    ("words", "blamed", "praised"),
    [
        ("kept me guessing", "phone", "film"),
        ("surprised me at every turn", "camera", "restaurant"),
        ("made me cry", "kitchen", "book"),
        ("went on and on", "airline", "camera"),
        ("held no surprises", "book", "kitchen"),
    ],
)
def test_some_idioms_change_polarity_between_domains(words: str, blamed: str, praised: str):
    assert positive_share(blamed, words) == 0
    assert positive_share(praised, words) == 1


@pytest.mark.parametrize(
    ("word", "blamed", "praised"),
    [
        (" unpredictable", "camera", "film"),
        (" predictable", "film", "phone"),
        (" small", "hotel", "phone"),
        (" thin", "airline", "phone"),
        (" warm", "kitchen", "restaurant"),
        (" sharp", "restaurant", "kitchen"),
        (" long", "book", "camera"),
    ],
)
def test_some_words_change_polarity_between_domains(word: str, blamed: str, praised: str):
    # A denial or a concession turns the word round, so it is a majority and not a rule.
    assert positive_share(blamed, word) < 0.5 < positive_share(praised, word)


def test_the_main_clause_decides_and_not_the_concession():
    tails = [(review.label, review.text.split(", but ")[1]) for review in sample() if ", but " in review.text]
    assert {label for label, tail in tails if re.search(r"disappointment|dreadful|poor|painfully|too ", tail)} == {0}
    assert {label for label, tail in tails if re.search(r"delight|superb|excellent|wonderfully|pleasantly", tail)} == {1}


def test_a_denial_turns_the_words_round():
    denials = [review for review in sample() if review.domain == "hotel" and "by no means" in review.text]
    assert {review.label for review in denials if "by no means soft" in review.text} == {0}
    assert {review.label for review in denials if "by no means thin" in review.text} == {1}
    assert {review.label for review in sample() if "not exactly the disaster I feared" in review.text} == {1}


def test_an_unknown_domain_is_named():
    with pytest.raises(ConfigError, match=r"no review domain 'opera'; the known domains are camera, phone, .*airline"):
        generate(["film", "opera"], 3, seed=1)


@pytest.mark.parametrize(("domains", "count"), [([], 1), (["film", "film"], 2), (["film"], -1)])
def test_an_impossible_request_is_refused(domains: list[str], count: int):
    with pytest.raises(ConfigError, match=re.escape(f"{count} reviews of domains {domains}")):
        generate(domains, count, seed=1)


def test_no_reviews_can_be_asked_for():
    assert generate(DOMAINS, 0, seed=1) == []
