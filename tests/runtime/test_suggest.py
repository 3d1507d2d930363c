"""Mistyped keys of a record -> the keys that were meant."""

from collections import Counter
from typing import Annotated, Literal

import pytest
from pydantic import Field

from flows.workspaces.overrides import apply
from stages.params import Params
from stages.register.policy import Policy
from stages.runtime.errors import InputError
from stages.runtime.schema import Section, validate_tree
from stages.runtime.suggest import known_keys, suggest

KNOWN = known_keys(Params)
LEAVES = Counter(key.rpartition(".")[2] for key in KNOWN)


def swapped(name):
    """Exchange two neighbouring letters in the middle of a name."""
    middle = next((at for at in range(len(name) // 2, len(name) - 1) if name[at] != name[at + 1]), 0)
    return name[:middle] + name[middle + 1] + name[middle] + name[middle + 2 :]


@pytest.mark.parametrize("key", [key for key in KNOWN if LEAVES[key.rpartition(".")[2]] == 1])
def test_a_name_that_is_unique_is_found_without_its_blocks(key):
    """Also with one wrong block before it."""
    name = key.rpartition(".")[2]
    for given in (name, f"nowhere.{name}"):
        assert given in KNOWN or suggest(given, KNOWN) == [key]


@pytest.mark.parametrize("key", [key for key in KNOWN if len(key.rpartition(".")[2]) > 4])
def test_two_exchanged_letters_are_found_in_the_same_block(key):
    """The key itself is suggested, and nothing else."""
    parents, dot, name = key.rpartition(".")

    assert suggest(f"{parents}{dot}{swapped(name)}", KNOWN) == [key]


@pytest.mark.parametrize("key", ["surprise", "prune.colour", "x", ""])
def test_nothing_is_suggested_for_what_resembles_nothing(key):
    """A wrong suggestion would be worse than none."""
    assert suggest(key, KNOWN) == []


def test_several_equally_near_keys_are_three_at_most():
    """All have the same name, and none of their blocks was given."""
    near = suggest("num_images", KNOWN)

    assert len(near) == 3
    assert {key.rpartition(".")[2] for key in near} == {"num_images"}


class Here(Section):
    """A source with a folder."""

    source: Literal["here"]
    folder: str = ""


class There(Section):
    """A source with an address."""

    source: Literal["there"]
    address: str = ""


class Model(Section):
    """A choice between the two."""

    model: Annotated[Here | There, Field(discriminator="source")]


class Chosen(Section):
    """The top of the file."""

    fetch: Model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "here", "address": "x"}, "fetch.model.address is not a known key with source here"),
        ({"source": "here", "foldr": "x"}, "fetch.model.foldr is not a known key; did you mean fetch.model.folder?"),
        ({"source": "there", "foldr": "x"}, "fetch.model.foldr is not a known key; remove it"),
    ],
)
def test_keys_of_another_source_are_not_suggested(given, message):
    """They would be refused next."""
    with pytest.raises(InputError) as caught:
        validate_tree({"fetch": {"model": given}}, Chosen, "params.yaml")

    assert message in caught.value.message


def test_a_block_without_its_source_lists_the_sources():
    """Other keys of the block do not choose one."""
    with pytest.raises(InputError, match=r"fetch\.model: the key source is missing; allowed: here, there$"):
        validate_tree({"fetch": {"model": {"folder": "x"}}}, Chosen, "params.yaml")


def test_keys_of_other_files_are_suggested_too(root):
    """Every record that is read from YAML has them, and so do overrides."""
    with pytest.raises(InputError, match=r"bugdet is not a known key; did you mean budget\?"):
        validate_tree({"bugdet": {}}, Policy, "promotion.yaml")
    with pytest.raises(InputError, match=r"finetune\.lerning_rate is not .* did you mean finetune\.learning_rate\?"):
        apply({"finetune.lerning_rate": 1}, root / "params.yaml")
