import numpy as np
import pytest
import torch

from attention_monitor import STATISTICS
from attention_monitor import traits as traits_module
from attention_monitor.probes.position import POSITION_SCORES
from attention_monitor.probes.repeated import REPEAT_SCORES
from attention_monitor.traits import Condition, Trait

TRAITS = [trait for trait in vars(traits_module).values() if isinstance(trait, Trait)]
ROLES = {trait.name: trait for trait in TRAITS}


def test_every_trait_has_a_word_of_its_own_and_says_why():
    assert len({trait.name for trait in TRAITS}) == len(TRAITS) >= 10
    assert all(trait.why and " " not in trait.name for trait in TRAITS)


@pytest.mark.parametrize("trait", TRAITS, ids=lambda trait: trait.name)
def test_what_a_trait_reads_is_a_statistic_or_a_score(trait):
    known = set(STATISTICS) | {score.name for score in (*POSITION_SCORES, *REPEAT_SCORES)}
    assert {condition.column for condition in trait.conditions} <= known


@pytest.mark.parametrize("score", [*POSITION_SCORES, *REPEAT_SCORES], ids=lambda score: score.name)
def test_roles_of_probes_take_word_and_threshold_from_the_trait(score):
    assert score.threshold == ROLES[score.role].threshold


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_a_trait_holds_where_all_conditions_do(make):
    trait = Trait("both", (Condition("a", ">=", 0.5), Condition("b", "<", 0.1)), "")
    values = {"a": make([0.5, 0.4, 0.9, float("nan")]), "b": make([0.0, 0.0, 0.1, 0.0])}
    assert trait.holds(values).tolist() == [True, False, False, False]
    assert trait.rule == "a >= 0.5 and b < 0.1"


def test_a_trait_without_conditions_and_a_sign_that_is_none_are_refused():
    with pytest.raises(ValueError, match="needs conditions, a tuple"):
        Trait("empty", (), "")
    with pytest.raises(ValueError, match="got '>>'"):
        Condition("entropy", ">>", 1)
