"""The embedded corpus: short English stories in which attention has something to find.

A seeded generator writes stories from a grammar of under two hundred words and knows, for each story, which token has
to look at which earlier token for the next one to be predictable. Several phrases of varying length may stand between
the two, so that no fixed offset solves a relation. Draw one with ``python -m gpt.stories``.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

NAMES = ("Tom", "Anna", "Ben", "Clara", "Sam", "Lucy", "Max", "Emma")
OBJECTS = ("coin", "lamp", "book", "cup", "map", "hat", "ring", "knife", "letter", "box")

# singular, plural, what it does, what it is: verb and adjective belong to one noun alone, so that
# predicting them takes knowing which noun is meant
NOUNS = (
    ("cat", "cats", "purred", "fluffy"),
    ("dog", "dogs", "barked", "loyal"),
    ("bell", "bells", "rang", "loud"),
    ("ball", "balls", "rolled", "round"),
    ("clock", "clocks", "ticked", "late"),
    ("bird", "birds", "sang", "wild"),
    ("key", "keys", "turned", "rusty"),
    ("fire", "fires", "burned", "hot"),
    ("flower", "flowers", "grew", "sweet"),
    ("boat", "boats", "sank", "slow"),
    ("frog", "frogs", "jumped", "green"),
    ("star", "stars", "shone", "bright"),
)
# singular, plural: what nouns stand near; in number it may differ from the noun or not
NEARBY = (("cabinet", "cabinets"), ("table", "tables"), ("door", "doors"), ("tree", "trees"), ("wall", "walls"),
          ("house", "houses"), ("chair", "chairs"), ("wagon", "wagons"))  # fmt: skip
SIZES = ("small", "big", "old", "new")
PREPOSITIONS = ("near", "behind", "beside", "under")
PLACES = ("mat", "floor", "roof", "hill", "road", "bridge")
PLACE_VERBS = ("sat", "stood", "stayed", "rested")
CHANT = ("moon", "rain", "snow", "wind", "gold", "iron", "salt", "milk", "bread", "stone",
         "wool", "silk", "wood", "glass", "sand", "corn")  # fmt: skip
FILLERS = ("The day was long.", "Nobody said a word.", "It began to snow.", "Time went by.", "All was quiet.")


@dataclass(frozen=True)
class Relation:
    """``query`` is the position of the token at which ``key``, an earlier position, has to be known."""

    query: int
    key: int
    name: str


@dataclass(frozen=True)
class Story:
    """A story as tokens (their concatenation is the text, beginning with a line break) and its relations.

    Relations:
        agreement: last token before the verb -> the subject (*The key near the cabinets | was*)
        adjective: *was* or *were* -> the noun that the adjective describes (*The key ... was | rusty*)
        pronoun: *It* or *They* -> the subject of the sentence before (*The cat sat on the mat. It | purred*)
        name: *Then* -> the name from the start of the story (*Anna hid a coin. ... Then | Anna*)
        object: *the* -> the object hidden earlier (*Anna hid a coin. ... found the | coin*)
        induction: a word of a repeated phrase -> what followed it the first time
    """

    tokens: tuple[str, ...]
    relations: tuple[Relation, ...]

    @property
    def text(self) -> str:
        return "".join(self.tokens)


class _Writer:
    """Writes one story token by token, noting relations on the way."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.tokens = ["\n"]
        self.relations: list[Relation] = []

    def write(self, words: str) -> int:
        """Append words (``.`` and ``"`` may cling to them); returns the position of the last token."""
        for word in words.split():
            stem = word.rstrip('."')
            if stem:
                self.tokens.append(stem if len(self.tokens) == 1 else " " + stem)
            self.tokens.extend(word[len(stem) :])
        return len(self.tokens) - 1

    def relate(self, query: int, key: int, name: str) -> None:
        self.relations.append(Relation(query, key, name))

    def noun_phrase(self, article: str, noun: str) -> int:
        size = self.rng.choice(SIZES) + " " if self.rng.random() < 0.3 else ""
        return self.write(f"{article} {size}{noun}")

    def subject(self, noun: tuple[str, ...], plural: bool, n_distractors: int) -> int:
        position = self.noun_phrase("The", noun[plural])
        for _ in range(n_distractors):
            self.write(self.rng.choice(PREPOSITIONS))
            self.noun_phrase("the", self.rng.choice(self.rng.choice(NEARBY)))
        return position

    def description(self) -> None:
        """The key near the cabinets was rusty. It turned."""
        noun, plural = self.rng.choice(NOUNS), self.rng.random() < 0.5
        subject = self.subject(noun, plural, self.rng.choice((0, 1, 1, 2)))
        before_verb = len(self.tokens) - 1
        if before_verb != subject:
            self.relate(before_verb, subject, "agreement")
        verb = self.write("were" if plural else "was")
        self.relate(verb, subject, "adjective")
        self.write(noun[3] + ".")
        if self.rng.random() < 0.6:
            pronoun = self.write("They" if plural else "It")
            self.relate(pronoun, subject, "pronoun")
            self.write(noun[2] + ".")

    def scene(self) -> None:
        """The cat beside the wall sat on the mat. It was fluffy."""
        noun, plural = self.rng.choice(NOUNS), self.rng.random() < 0.5
        subject = self.subject(noun, plural, self.rng.choice((0, 0, 1, 2)))
        self.write(f"{self.rng.choice(PLACE_VERBS)} on the {self.rng.choice(PLACES)}.")
        pronoun = self.write("They" if plural else "It")
        self.relate(pronoun, subject, "pronoun")
        if self.rng.random() < 0.5:
            self.write(noun[2] + ".")
        else:
            verb = self.write("were" if plural else "was")
            self.relate(verb, subject, "adjective")
            self.write(noun[3] + ".")

    def filler(self) -> None:
        self.write(self.rng.choice(FILLERS))


def write_story(rng: random.Random) -> Story:
    """One story: something is hidden, things happen, it is found; somebody says a phrase twice."""
    story = _Writer(rng)
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    name_at = thing_at = -1

    def hide() -> None:
        nonlocal name_at, thing_at
        name_at = story.write(name)
        thing_at = story.write(f"hid a {thing}")
        story.write(".")

    opening = [hide, rng.choice((story.scene, story.description))]
    rng.shuffle(opening)
    middle = [rng.choice((story.description, story.scene, story.filler)) for _ in range(rng.choice((0, 1, 2)))]
    for sentence in opening + middle:
        sentence()

    then = story.write("Then")
    story.relate(then, name_at, "name")
    the = story.write(f"{name} found the")
    story.relate(the, thing_at, "object")
    story.write(thing + ".")

    phrase = rng.sample(CHANT, rng.choice((3, 4, 5)))
    first = story.write(f"We sing {phrase[0]}")
    story.write(" ".join(phrase[1:]) + ".")
    if rng.random() < 0.5:
        rng.choice((story.filler, story.description, story.scene))()
    for i, word in enumerate(phrase):
        again = story.write(f"Again {word}" if i == 0 else word)
        if i + 1 < len(phrase):
            story.relate(again, first + i + 1, "induction")
    story.write(".")
    return Story(tuple(story.tokens), tuple(story.relations))


def write_stories(n: int, seed: int) -> Iterator[Story]:
    """``n`` stories; the same seed gives the same stories on every machine."""
    rng = random.Random(seed)
    return (write_story(rng) for _ in range(n))


# (text, [((first character, character after the last) of the query, the same of the key, name of the relation)])
AnnotatedText = tuple[str, list[tuple[tuple[int, int], tuple[int, int], str]]]


def annotated_stories(n: int = 40, seed: int = 1_000_003) -> list[AnnotatedText]:
    """Stories that the corpus does not have, with the characters of each relation's query and key."""
    annotated: list[AnnotatedText] = []
    for story in write_stories(n, seed):
        ends = list(accumulate(len(token) for token in story.tokens))
        spans = list(zip([0, *ends], ends, strict=False))
        annotated.append((story.text, [(spans[r.query], spans[r.key], r.name) for r in story.relations]))
    return annotated


if __name__ == "__main__":
    for story in write_stories(3, seed=random.randrange(10**6)):
        print(story.text)
        for relation in story.relations:
            print(f"  {relation.name:10} {story.tokens[relation.query]!r} -> {story.tokens[relation.key]!r}")
