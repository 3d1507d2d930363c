"""Valid files -> damaged ones: bytes changed, and values of JSON and YAML replaced."""

import copy
import json

from hypothesis import strategies

DEPTHS = (80, 3000, 100_000)
"""Levels of lists that `dump` writes."""
HOSTILE = [
    None,
    True,
    -1,
    0,
    3,
    10**7,
    10**30,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../x",
    "x\nError: y\x1b[2J",
    "\ud800",
    "9" * 5000,
    "a" * 100_000,
    [],
    {},
    [1],
    {"a": 1},
    [[]] * 1000,
    [0] * 5000,
    *(f"nested {depth}" for depth in DEPTHS),
]
"""Values of other types, sizes and forms than any field expects."""
OPERATIONS = ("flip", "cut", "insert", "repeat", "zero")


def places(tree, at=()):
    """List the paths to all values of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at, *(place for key, value in items for place in places(value, (*at, key)))]


def parent_of(tree, place):
    """Return the list or block that holds the value at a place."""
    for key in place[:-1]:
        tree = tree[key]
    return tree


@strategies.composite
def damaged_trees(draw, tree):
    """Replace, remove or rename one to three values of a tree."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(strategies.integers(1, 3))):
        known = places(tree)
        place = known[draw(strategies.integers(0, len(known) - 1))]
        value = copy.deepcopy(draw(strategies.sampled_from(HOSTILE)))
        if not place:
            if draw(strategies.integers(0, 9)) == 0:
                return value
            continue
        parent, key = parent_of(tree, place), place[-1]
        action = draw(strategies.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "replace":
            parent[key] = value
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(strategies.sampled_from(["auto_map", "x", "_class_name", "__init__", "\n"]))] = value
    return tree


@strategies.composite
def damaged_bytes(draw, content):
    """Change one to four places of some bytes, more often near their beginning, where headers are."""
    content = bytearray(content)
    for _ in range(draw(strategies.integers(1, 4))):
        end = draw(strategies.sampled_from([16, 200, len(content)]))
        at = draw(strategies.integers(0, max(0, min(end, len(content)) - 1)))
        operation = draw(strategies.sampled_from(OPERATIONS))
        if operation == "flip" and content:
            content[at] = draw(strategies.integers(0, 255))
        elif operation == "cut":
            del content[at:]
        elif operation == "insert":
            content[at:at] = draw(strategies.binary(max_size=12))
        elif operation == "repeat":
            content[at:at] = content[at : at + 64]
        else:
            content[at : at + 8] = bytes(8)
    return bytes(content)


def dump(tree):
    """Write a tree as JSON, which is also YAML, with values nested more deeply than Python's encoder writes them."""
    text = json.dumps(tree)
    for depth in DEPTHS:
        text = text.replace(f'"nested {depth}"', "[" * depth + "]" * depth)
    return text.encode()
