"""Short reviews written by this file: the text of the default job, which needs no download.

A device's words are not the cloud's words. The public domains here are things one buys, the private ones are places one goes to
and stories one is told, and many words change sides between them: an unpredictable shutter is a fault, an unpredictable plot is
praise; a small phone, a small hotel room; a battery that goes on and on, a film that does. A cloud that learns from the public
domains alone is misled about the private ones, by the text and not by a label that was flipped.

From the bottom up:
    `_Lexicon`   one domain: facets (subjects with the adjectives that praise or blame them), idioms, settings without opinion
    `_clause`    a subject, a verb, a degree and an adjective: a claim, a denial of the opposite, or a concession to the other side
    `_TEMPLATES` how clauses make a sentence; the main clause, never the concession, decides the label

Grammar is kept by construction: everything is in the past tense, and a subject that ends in s is a plural.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cooperllm.algorithm.noise import Stream, bits, derive, rademacher
from cooperllm.errors import ConfigError

LABEL_NAMES = ("negative", "positive")
"""Name of each label, by its number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Review:
    """One labelled sentence.

    Attributes:
        text: The sentence, 8 to 25 words.
        label: Index into `LABEL_NAMES`.
        domain: One of `DOMAINS`.
    """

    text: str
    label: int
    domain: str


@dataclass(frozen=True, slots=True)
class _Facet:
    """Subjects, without their article, and adjectives that fit every one of them; each a list with commas."""

    subjects: str
    good: str
    bad: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lexicon:
    """All the words of one domain; `praise` and `blame` continue "This thing ..."."""

    things: str
    settings: str
    facets: tuple[_Facet, ...]
    praise: str
    blame: str


_LEXICONS = {
    "camera": _Lexicon(
        things="camera, new camera, little camera",
        settings="on a rainy hike, at a family wedding, in the first week, on a trip to Norway, at the zoo, in the studio",
        facets=(
            _Facet("focus motor, shutter, light meter", "predictable, steady, quick, quiet", "unpredictable, slow, moody, wild, loud"),
            _Facet("body, casing, grip", "small, light, compact, thin, tough, firm", "large, heavy, big, soft, bulky"),
            _Facet("photos, portraits, pictures", "sharp, bright, clean, crisp", "soft, dark, grainy, moody, strange"),
            _Facet("menus, controls, settings", "simple, familiar, plain", "complex, mysterious, strange, surprising"),
            _Facet("battery life, recording time, warranty", "long, generous", "short, brief"),
        ),
        praise="held no surprises, did exactly what I expected, went on and on, never missed a smile, disappeared into my pocket",
        blame="kept me guessing, left me in tears, surprised me at every turn, blurred half of my trip, took me on a wild ride",
    ),
    "phone": _Lexicon(
        things="phone, new phone, handset",
        settings="after an update, in the first month, on the train, at work, during a long call, in the summer heat",
        facets=(
            _Facet("body, frame, case", "thin, small, light, compact, tough", "heavy, large, big, bulky, delicate"),
            _Facet("screen, display, home page", "bright, sharp, clean, crisp", "dark, moody, grainy, cracked"),
            _Facet("software, system, assistant", "predictable, familiar, quick, simple", "unpredictable, dramatic, complex, slow"),
            _Facet("charger, battery, back cover", "cool, cold to the touch, thin", "hot, warm, heavy"),
            _Facet("speaker, ringtone, alarm", "loud, sharp, clear", "quiet, soft, gentle"),
        ),
        praise="held no surprises, disappeared into my pocket, went on and on, survived every fall, did exactly what I expected",
        blame="kept me guessing, kept me up all night, made me cry, was full of twists, died before lunch",
    ),
    "kitchen": _Lexicon(
        things="kettle, blender, toaster, food mixer",
        settings="on a busy morning, in my tiny kitchen, after a month, at breakfast, on the first try, before a dinner party",
        facets=(
            _Facet("lid, handle, switch", "firm, tight, tough, solid", "soft, loose, warm, delicate"),
            _Facet("casing, base, outer shell", "cold, cool, thin, compact", "hot, warm, big, heavy"),
            _Facet("motor, timer, thermostat", "steady, predictable, quick", "wild, unpredictable, lively, jumpy"),
            _Facet("buttons, instructions, programs", "simple, plain, familiar", "complex, mysterious, surprising, strange"),
            _Facet("blades, edges, cutters", "sharp, hard, tough, thin", "soft, delicate, dull, blunt"),
        ),
        praise="held no surprises, did exactly what I expected, crushed ice in seconds, was easy to clean, ran like a machine",
        blame="gave me goosebumps, blew a fuse, made me cry, took me on a wild ride, melted before my eyes",
    ),
    "film": _Lexicon(
        things="film, movie, thriller, drama",
        settings="on opening night, at the festival, on a second viewing, in a packed cinema, on a rainy Sunday, after the break",
        facets=(
            _Facet("plot, story, script", "unpredictable, dark, complex, mysterious, clever", "predictable, simple, familiar, thin, lazy"),
            _Facet("acting, dialogue, lead role", "warm, subtle, tender, dramatic, honest", "wooden, mechanical, stiff, cold, loud"),
            _Facet("lighting, camera work, soundtrack", "dark, moody, soft, strange, graceful", "flat, cold, plain, loud, ugly"),
            _Facet("opening scene, prologue, middle act", "short, brief", "long"),
            _Facet("final twists, chases, love scenes", "surprising, wild, tender", "predictable, mechanical, familiar, tired"),
        ),
        praise="kept me guessing, left me in tears, surprised me at every turn, earned its applause, had me on the edge of my seat",
        blame="held no surprises, went on and on, put me to sleep, had me checking my watch, was easy to forget",
    ),
    "book": _Lexicon(
        things="book, novel, thriller, paperback",
        settings="over the holidays, on the night train, after the first page, in one weekend, at our book club, on the beach",
        facets=(
            _Facet("plot, mystery, story", "unpredictable, dark, complex, strange, clever", "predictable, simple, familiar, thin, lazy"),
            _Facet("characters, heroes, villains", "complex, mysterious, warm, moody, believable", "flat, simple, cold, wooden, tame"),
            _Facet("prose, style, narrator", "delicate, subtle, dark, tender, witty", "plain, dry, stiff, cold, clumsy"),
            _Facet("chapters, descriptions, passages", "short, brief, vivid", "long, dry"),
            _Facet("ending, last chapter, final secret", "surprising, dramatic, strange, dark", "predictable, familiar, tame, plain, flat"),
        ),
        praise="kept me up all night, made me cry, haunted me for days, kept me turning pages, sent a shiver down my spine",
        blame="held no surprises, put me to sleep, went on and on, gathered dust half read, read like a manual",
    ),
    "hotel": _Lexicon(
        things="hotel, guest house, resort, inn",
        settings="on our anniversary, in late October, on a weekend in Rome, after a long drive, on a business trip, in high season",
        facets=(
            _Facet("room, bathroom, suite", "large, big, quiet, warm, spacious", "small, tight, cold, loud, dark"),
            _Facet("bed, pillows, sofa", "soft, warm, large, comfortable", "hard, thin, firm, small, lumpy"),
            _Facet("receptionist, manager, porter", "warm, gentle, lively, polite", "cold, sharp, stiff, loud, moody"),
            _Facet("towels, blankets, bathrobes", "soft, warm, heavy, large", "thin, stiff, small, light, damp"),
            _Facet("check-in, way to the beach, walk to town", "short, brief", "long"),
        ),
        praise="felt like home, spoiled me from the first hour, melted my worries away, surprised me at every turn, sang me to sleep",
        blame="kept me up all night, smelled of old carpet, felt like a factory, was easy to forget, hid a fee in every bill",
    ),
    "restaurant": _Lexicon(
        things="restaurant, bistro, place, diner",
        settings="on a Friday night, on my birthday, at lunch, on our second visit, after the theatre, on a date",
        facets=(
            _Facet("soup, curry, stew", "hot, warm, complex, surprising, tasty", "cold, thin, plain, watery, predictable"),
            _Facet("steak, lamb, chicken", "tender, soft, hot, delicate, juicy", "tough, dry, cold, hard, greasy"),
            _Facet("portions, desserts, pies", "big, large, rich, warm", "small, light, thin, dry, stale"),
            _Facet("waiter, owner, chef", "warm, gentle, lively, polite", "cold, sharp, stiff, moody, rude"),
            _Facet("dining room, bar, terrace", "lively, warm, quiet, roomy", "loud, cold, small, tight, dark"),
        ),
        praise="had me licking the plate, made my mouth water, surprised me at every turn, took me on a wild ride, sent me home full",
        blame="sent me home hungry, left a bad taste in my mouth, held no surprises, was easy to forget, felt like a factory",
    ),
    "airline": _Lexicon(
        things="airline, carrier, flight",
        settings="on the way to Lisbon, on a trip to Boston, over the Atlantic, in economy, after a missed connection, in a storm",
        facets=(
            _Facet("cabin, aisle, back row", "quiet, roomy, large, warm", "tight, small, loud, cold, dirty"),
            _Facet("seat, headrest, cushion", "soft, warm, large, comfortable", "thin, hard, small, firm, broken"),
            _Facet("crew, pilot, steward", "warm, gentle, lively, polite", "cold, sharp, stiff, rude"),
            _Facet("meal, dinner, breakfast", "hot, warm, surprising, tasty", "cold, dry, tough, plain, small, strange"),
            _Facet("boarding, transfer, layover", "short, brief", "long"),
        ),
        praise="felt like first class, got me home early, melted my worries away, surprised me at every turn, spoiled me all the way",
        blame="left me on the tarmac, went on and on, lost my suitcase, kept me up all night, felt like a factory",
    ),
}

PUBLIC_DOMAINS = ("camera", "phone", "kitchen")
"""Domains the cloud of the default job may read."""

PRIVATE_DOMAINS = ("film", "book", "hotel", "restaurant", "airline")
"""Domains that stay on devices; they share no domain, and few meanings, with the public ones."""

DOMAINS: tuple[str, ...] = tuple(_LEXICONS)
"""Every domain, public and private; the position of a domain names its bits, so a new one goes last."""

# Pairs are (negative, positive). The words from here on mean the same everywhere: they are what one domain can teach another.
_PLAIN_DEGREES = "very, really, so, truly, remarkably, unusually"
_LOADED_DEGREES = ("too, far too, painfully", "wonderfully, delightfully, pleasantly")
_MILD_DEGREES = ("a little, slightly, somewhat", "fairly, reasonably, quite")
_DENIALS = "not exactly, hardly, far from, anything but, not at all, by no means"
_OPINIONS = (
    "a disappointment, a let-down, poor, dreadful, no better than average, worse than I had feared, not up to much",
    "a delight, a pleasure, excellent, superb, better than average, as good as I had hoped, a real treat",
)
_VERDICTS = (
    "I would not choose it again, I wanted my money back, I regretted my choice, I was sorry I chose it, I warned all my friends",
    "I would choose it again, I was happy to pay for it, I praised my choice, I was glad I chose it, I told all my friends",
)
_EXPECTATIONS = (
    "not quite the treat I had hoped for, hardly the gem they promised, no match for its good name",
    "not exactly the disaster I feared, hardly the waste of money I expected, much better than its bad name",
)

_TEMPLATES = (
    "{setting}, {claim}, and {second_claim}.",
    "{claim}, {second_claim}, and {thing} {idiom}.",
    "{thing} {idiom}, and {claim}.",
    "{setting}, {claim}, and {thing} {idiom}.",
    "{claim}, and {verdict}.",
    "{setting}, {opinion}, and {claim}.",
    "{setting}, {thing} {idiom}, and {opinion}.",
    "{setting}, {denial}, and {claim}.",
    "{denial}, and {thing} {idiom}.",
    "{setting}, {concession}, but {claim}.",
    "{concession}, but {opinion}.",
    "{setting}, {claim}, even though {concession}.",
    "{thing} was {expectation}: {claim}.",
)
"""All equally likely."""


class _Choice:
    """Spends the bits of one sentence; it never says a word twice while it knows another."""

    def __init__(self, seed: int, index: int) -> None:
        self._numbers: Iterator[int] = iter(bits(seed, index, 32, stream=Stream.CHOICE).tolist())  # 23 are spent
        self._said: set[str] = set()

    def word(self, words: str) -> str:
        known = words.split(", ")
        fresh = [word for word in known if word not in self._said] or known
        chosen = self.one_of(fresh)
        self._said.add(chosen)
        return chosen

    def one_of(self, options: Sequence[str]) -> str:
        return options[next(self._numbers) % len(options)]

    def three_of(self, facets: Sequence[_Facet]) -> list[_Facet]:
        remaining = list(facets)
        return [remaining.pop(next(self._numbers) % len(remaining)) for _ in range(3)]


def generate(domains: Sequence[str], count: int, seed: int) -> list[Review]:
    """Writes labelled review sentences, the domains dealt in turn.

    A sentence depends on the seed, its domain and its place within that domain alone: a longer list begins with the shorter one,
    and a domain's sentences are the same whichever domains are asked for beside it.

    Args:
        domains: Names out of `DOMAINS`, at least one, each at most once.
        count: Number of sentences >= 0, over all domains together.
        seed: Names a family of sentences, in [0, 2⁶⁴).

    Returns:
        The reviews, in the order dealt. Of every two consecutive sentences of a domain one is positive.

    Raises:
        ConfigError: A domain is unknown or named twice, none is named, or the count is negative.

    Example:
        >>> generate(["film"], 1, seed=7)[0].text
        'This movie was easy to forget, and the prologue was far too long.'
    """
    _check(domains, count)
    return [_review(domains[i % len(domains)], i // len(domains), seed) for i in range(count)]


def _check(domains: Sequence[str], count: int) -> None:
    for domain in domains:
        if domain not in _LEXICONS:
            raise ConfigError(f"there is no review domain {domain!r}; the known domains are {', '.join(DOMAINS)}")
    if not domains or len(set(domains)) < len(domains) or count < 0:
        raise ConfigError(f"{count} reviews of domains {list(domains)}: name one domain or more, each once, and a count of at least 0")


def _review(domain: str, index: int, seed: int) -> Review:
    family = derive(seed, DOMAINS.index(domain))
    # Labels come in pairs of opposites in random order: balanced in every stretch, yet not told by the parity of the index.
    label = (index + int(rademacher(family, index // 2, 1)[0] > 0)) % 2
    return Review(text=_sentence(_LEXICONS[domain], label, _Choice(family, index)), label=label, domain=domain)


def _sentence(lexicon: _Lexicon, label: int, choice: _Choice) -> str:
    """Draws every kind of clause and keeps those that a template asks for."""
    first, second, third = choice.three_of(lexicon.facets)
    clauses = {
        "setting": choice.word(lexicon.settings),
        "thing": "this " + choice.word(lexicon.things),
        "idiom": choice.word(lexicon.praise if label else lexicon.blame),
        "claim": _clause(first, label, f"{_PLAIN_DEGREES}, {_LOADED_DEGREES[label]}", choice),
        "second_claim": _clause(second, label, _PLAIN_DEGREES, choice),
        "denial": _clause(second, 1 - label, _DENIALS, choice),
        "concession": _clause(third, 1 - label, _MILD_DEGREES[1 - label], choice),
        "opinion": f"{_subject(second, choice)} {choice.word(_OPINIONS[label])}",
        "verdict": choice.word(_VERDICTS[label]),
        "expectation": choice.word(_EXPECTATIONS[label]),
    }
    sentence = choice.one_of(_TEMPLATES).format_map(clauses)
    return sentence[0].upper() + sentence[1:]


def _clause(facet: _Facet, label: int, degrees: str, choice: _Choice) -> str:
    return f"{_subject(facet, choice)} {choice.word(degrees)} {choice.word(facet.good if label else facet.bad)}"


def _subject(facet: _Facet, choice: _Choice) -> str:
    noun = choice.word(facet.subjects)
    return f"the {noun} {'were' if noun.endswith('s') else 'was'}"
