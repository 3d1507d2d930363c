"""params.yaml -> checked types."""

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from stages.models.params import CALL_TWICE
from stages.params import load_params
from stages.runtime.errors import InputError
from stages.variants.params import VariantsParams


@pytest.fixture
def changed(root, tmp_path):
    """Write params.yaml with one value changed."""

    def change(key, value):
        tree = YAML(typ="safe").load((root / "params.yaml").read_text())
        *path, last = key.split(".")
        block = tree
        for part in path:
            block = block[part]
        block[last] = value
        YAML(typ="safe").dump(tree, tmp_path / "params.yaml")
        return tmp_path / "params.yaml"

    return change


def test_params_are_frozen(params):
    """An assignment to a loaded value is an error."""
    with pytest.raises(ValidationError, match="frozen"):
        params.seed = 1


def test_scientific_notation_is_a_number(tmp_path, root):
    """1e-4 is a float, as DVC reads it."""
    text = (root / "params.yaml").read_text().replace("learning_rate: 5.0e-4", "learning_rate: 1e-4")
    (tmp_path / "params.yaml").write_text(text)

    assert load_params(tmp_path / "params.yaml").finetune.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("prune.target.ratio", 1.5, "prune.target.ratio is 1.5: input should be less than 1"),
        ("prune.ratoi", 0.3, "prune.ratoi is not a known key; did you mean prune.target.ratio?"),
        ("prune.ratio", 0.3, "prune.ratio is not a known key; did you mean prune.target.ratio?"),
        ("prune.target", {"macs": 44}, "prune.target.macs is 44: did you mean 44%?"),
        ("prune.target", {"params": 30.5}, "prune.target.params is 30.5: did you mean 30.5%?"),
        ("prune.target", {"macs": "44 %"}, "prune.target.macs is '44 %': did you mean 44%?"),
        ("prune.target", {"ratio": 30}, "prune.target.ratio is 30: did you mean 0.3?"),
        ("prune.target", {"ratio": "30%"}, "prune.target.ratio is '30%': did you mean 0.3?"),
        ("prune.target.macs", 1e9, "prune.target: "),
        (
            "prune.target",
            {"macs": "half"},
            "prune.target.macs is 'half': give a number above 0, or a percentage",
        ),
        ("prune.target", {"latency_ms": "0%"}, "such as 56%"),
        ("prune.target", {}, "give exactly one of ratio, macs, params, latency_ms"),
        ("prune.target", {"macs": True}, "macs is true, which is allowed for switches only"),
        ("costs.batches", [1, True], "batches is [1, true], which is allowed for switches only"),
        ("seed", True, "seed is true"),
        ("prune.floor", float("nan"), "prune.floor is nan"),
        ("prune.round_to", 12, "prune.round_to is 12: input should be 1, 2, 4, 8, 16, 32 or 64"),
        ("surprise", 1, "surprise is not a known key; remove it or correct its spelling"),
        ("importance.criterion", "hessian", "importance.criterion is 'hessian': input should be 'random', 'magnitude'"),
        ("seed", -1, "seed is -1"),
        ("reference.kid_subset_size", 5000, "kid_subset_size 5000 is more than num_images"),
        ("reference.neighbours", 500, "neighbours 500 is not less than num_images 500"),
        ("reference.sampler.scheduler", "DDIMM", "reference.sampler.scheduler is 'DDIMM': input should be 'DDIM'"),
        ("reference.sampler", {"scheduler": "PNDM", "steps": 5, "eta": 0.5}, "scheduler PNDM has neither eta nor"),
        ("reference.sampler", {"scheduler": "UniPCMultistep", "steps": 5, "clip": True}, "does not clip"),
        ("reference.extractor.sha256", "6726825d", "reference.extractor.sha256 is '6726825d'"),
        ("costs.batches", [], "costs.batches is []"),
        ("variants", {"kinds": ["int9"]}, "variants.kinds is ['int9']: 'int9' is not a kind of variant; allowed: int8"),
        ("variants", {"kinds": ["int8", ["int8"]]}, "a kind is named twice"),
        ("variants", {"kinds": ["int8"], "models": ["pretrained"]}, "input should be 'dense', 'pruned' or 'finetuned'"),
        ("variants", {"kinds": []}, "variants.kinds is []: write a list of at least 1"),
        ("fetch.model.source", "ftp", "fetch.model: "),
    ],
)
def test_a_wrong_value_is_named_in_one_line(changed, key, value, expected):
    """The message names the key, the value and what is allowed."""
    with pytest.raises(InputError) as caught:
        load_params(changed(key, value))

    assert expected in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [("seed: [", "is not valid YAML"), ("seed: 2024-99-99", "is not valid YAML"), ("", "the file is None")],
)
def test_an_invalid_params_file_is_refused(tmp_path, text, expected):
    """Broken and empty files give different messages."""
    (tmp_path / "params.yaml").write_text(text)

    with pytest.raises(InputError, match=expected) as caught:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in caught.value.message


def test_a_wrong_item_is_told_once(changed):
    """Without it the list is too short as well, which is no mistake of its own; an empty list is one."""
    with pytest.raises(InputError) as caught:
        load_params(changed("variants", {"models": ["nobody"], "kinds": ["int8"]}))
    assert "models.0 is 'nobody'" in caught.value.message
    assert "at least" not in caught.value.message
    with pytest.raises(InputError, match="write a list of at least 1"):
        load_params(changed("variants", {"kinds": []}))


def test_a_text_in_place_of_a_block_names_its_keys(changed):
    """What stands there is often the value of one of them."""
    with pytest.raises(InputError, match=r"write a block, .* in each line; it has name, weights, sha256"):
        load_params(changed("reference.extractor", "inception-v3-compat"))


def test_a_misspelt_key_is_told_before_the_one_that_is_missing(root, tmp_path):
    """Both are true; the first is what to change."""
    text = (root / "params.yaml").read_text().replace("  num_images: 500", "  num_image: 500")
    (tmp_path / "params.yaml").write_text(text)

    with pytest.raises(InputError, match=r"num_image is not a known key; .*; reference\.num_images: field"):
        load_params(tmp_path / "params.yaml")


def test_a_default_that_could_not_be_computed_is_not_told(root, tmp_path):
    """The value that it is computed from is wrong, and is told alone."""
    tree = YAML(typ="safe").load((root / "params.yaml").read_text())
    tree["reference"]["num_images"] = 1
    del tree["reference"]["kid_subset_size"]
    YAML(typ="safe").dump(tree, tmp_path / "params.yaml")

    with pytest.raises(InputError, match=r"num_images is 1: [^;]*$"):
        load_params(tmp_path / "params.yaml")


def test_a_cache_without_a_second_full_pass_is_refused(changed):
    """N may be as large as the number of sampling steps, and no larger."""
    assert load_params(changed("variants", {"kinds": ["cache-50"]})).variants
    with pytest.raises(InputError, match=r"cache-51, and reference\.sampler\.steps is 50"):
        load_params(changed("variants", {"kinds": ["cache-51"]}))


@pytest.mark.parametrize("scheduler", CALL_TWICE)
def test_a_cache_of_a_sampler_that_repeats_timesteps_is_the_shortest(changed, scheduler):
    """The second pass at a timestep is full, so that a longer cache would draw as cache-2 and be timed as longer."""
    reference = load_params(changed("reference.sampler.scheduler", scheduler)).reference
    VariantsParams(kinds=("cache-2",)).check_protocol(reference)
    with pytest.raises(InputError, match=f"has cache-3, and {scheduler} calls the model twice at .* choose cache-2"):
        VariantsParams(kinds=("cache-3",)).check_protocol(reference)


def test_a_graph_under_another_precision_is_refused(changed):
    """It computes in float32; the message names both keys."""
    path = changed("variants", {"kinds": ["int8", "onnx"]})
    assert load_params(path).variants.models == ("dense", "finetuned")
    tree = YAML(typ="safe").load(path.read_text())
    tree["reference"]["precision"] = "bfloat16"
    YAML(typ="safe").dump(tree, path)

    with pytest.raises(
        InputError, match=r"variants\.kinds has onnx, which computes in float32, and reference\.precision"
    ):
        load_params(path)


@pytest.mark.parametrize("target", [{"latency_ms": 44}, {"macs": 101}, {"macs": 0.44}, {"params": "44%"}, {"ratio": 0}])
def test_an_amount_that_can_be_meant_is_taken(changed, target):
    """Milliseconds have any size, and a number below 1 is a share."""
    assert load_params(changed("prune.target", target)).prune.target.given() == target


def test_a_missing_file_is_refused(tmp_path):
    """The message asks to correct the path."""
    with pytest.raises(InputError, match="correct the path to it"):
        load_params(tmp_path / "params.yaml")


SHORT = """
seed: 0
fetch: {model: {source: bundled, name: digits}, data: {source: bundled, name: digits}}
reference: {sampler: {steps: 50}, num_images: 300, extractor: {name: digits}}
importance: {criterion: diff-pruning}
prune: {target: {ratio: 0.3}}
rounds: {count: 1}
finetune: {steps: 100}
variants: null
costs: {seconds: 4}
"""


@pytest.mark.parametrize(("num_images", "expected"), [(300, 150), (50_000, 1000), (3, 2)])
def test_a_short_file_has_the_defaults_of_all_other_keys(tmp_path, num_images, expected):
    """Every block has to be there, since DVC asks for it; of KID's subsets the default is half of the images."""
    (tmp_path / "params.yaml").write_text(SHORT.replace("num_images: 300", f"num_images: {num_images}, neighbours: 1"))
    found = load_params(tmp_path / "params.yaml")

    assert found.reference.kid_subset_size == expected
    assert found.finetune.batch_size == 64
    assert found.fetch.heldout == 0.1


@pytest.mark.parametrize(
    ("given", "left", "advice"),
    [
        ("seed: 0\n", "", "seed: field required; add it: a whole number from 0"),
        ("rounds: {count: 1}\n", "", "rounds: field required; add it: a block, {} for its defaults"),
        ("variants: null\n", "", "variants: field required; add it: a block with kinds or null"),
        ("reference: {sampler", "# ", "reference: field required; add it: a block with sampler, num_images, extractor"),
        (
            "target: {ratio: 0.3}",
            "",
            "prune.target: field required; add it: a block with some of ratio, macs, params, lat",
        ),
        (
            "model: {source: bundled, name: digits}, ",
            "",
            "fetch.model: field required; add it: a block with source and ",
        ),
        ("steps: 100", "", "finetune.steps: field required; add it: a whole number from 1"),
        (
            "data: {source: bundled, name: digits}",
            "data: {source: folder}",
            "fetch.data.path: field required; add it: a path",
        ),
    ],
)
def test_a_key_that_is_missing_is_named_with_what_to_write(tmp_path, given, left, advice):
    """Its kind and limits, null only where that is allowed; DVC would say so only at the stage that reads it."""
    (tmp_path / "params.yaml").write_text(SHORT.replace(given, left))

    with pytest.raises(InputError) as refusal:
        load_params(tmp_path / "params.yaml")
    assert f"params.yaml: {advice}" in refusal.value.message
