from collections import Counter, defaultdict

import pytest

from gpt.stories import write_stories
from gpt.tokenizer import load_bpe

STORIES = list(write_stories(2000, seed=5))
NAMES = ("agreement", "adjective", "pronoun", "name", "object", "induction")


def pairs(name):
    return [(story, r) for story in STORIES for r in story.relations if r.name == name]


def test_the_same_seed_gives_the_same_stories():
    assert list(write_stories(5, seed=1)) == list(write_stories(5, seed=1))
    assert list(write_stories(5, seed=1)) != list(write_stories(5, seed=2))


def test_the_vocabulary_has_one_to_two_hundred_words():
    words = {token.strip() for story in STORIES for token in story.tokens}
    assert 100 <= len(words) <= 200


def test_each_token_is_one_token_of_the_trained_bpe(tmp_path):
    text = "".join(story.text for story in STORIES)
    encoding = load_bpe([text], 1024, tmp_path / "bpe")
    for story in STORIES:
        assert [encoding.decode([i]) for i in encoding.encode_ordinary(story.text)] == list(story.tokens)
    ids = encoding.encode_ordinary(text)  # also when the stories follow each other
    assert len(ids) == sum(len(story.tokens) for story in STORIES)


def test_a_story_fits_into_the_context():
    assert max(len(story.tokens) for story in STORIES) <= 128


@pytest.mark.parametrize("name", NAMES)
def test_relations_look_back_over_distances_that_no_fixed_offset_solves(name):
    offsets = Counter(r.query - r.key for _, r in pairs(name))
    assert min(offsets) >= 1
    assert offsets.most_common(1)[0][1] / offsets.total() <= 0.6
    assert len(offsets) >= 5


def test_every_relation_is_known():
    assert {r.name for story in STORIES for r in story.relations} == set(NAMES)


def test_agreement_leads_from_a_distractor_to_the_subject_whose_number_the_verb_has():
    misled = 0
    for story, r in pairs("agreement"):
        plural = story.tokens[r.key].endswith("s")
        assert story.tokens[r.query + 1] == (" were" if plural else " was")
        misled += story.tokens[r.query].endswith("s") != plural
    assert 0.3 < misled / len(pairs("agreement")) < 0.7  # the nearest noun does not tell


@pytest.mark.parametrize(("name", "step"), [("adjective", 1), ("pronoun", 1)])
def test_what_follows_is_decided_by_the_key(name, step):
    """Among those that follow the query, each word but the copula belongs to one noun."""
    nouns = defaultdict(set)
    for story, r in pairs(name):
        following = story.tokens[r.query + step]
        if following not in (" was", " were"):
            nouns[following].add(story.tokens[r.key].strip().removesuffix("s"))
    assert len(nouns) >= 10
    assert all(len(keys) == 1 for keys in nouns.values())


def test_pronouns_stand_in_another_sentence_than_their_noun():
    for story, r in pairs("pronoun"):
        assert "." in story.tokens[r.key : r.query]
        assert story.tokens[r.query] == (" They" if story.tokens[r.key].endswith("s") else " It")


@pytest.mark.parametrize("name", ["name", "object"])
def test_names_and_objects_are_recalled(name):
    for story, r in pairs(name):
        assert story.tokens[r.query + 1].strip() == story.tokens[r.key].strip()
        assert Counter(token.strip() for token in story.tokens[: r.query + 1])[story.tokens[r.key].strip()] == 1


def test_induction_leads_to_what_followed_the_first_time():
    for story, r in pairs("induction"):
        assert story.tokens[r.key - 1] == story.tokens[r.query]
        assert story.tokens[r.query + 1] == story.tokens[r.key]
