"""An own class at fetch: which file runs, under which hash, and what is said of code that ends the program."""

import pytest
import torch
from diffusers import UNet2DModel
from pydantic import ValidationError

from stages.fetch import model as fetch_module
from stages.fetch.model import fetch_model
from stages.fetch.params import FolderModel, HubModel
from stages.fetch.pickles import BIN
from stages.fetch.weights import with_safetensors
from stages.models.families import OWN, example_inputs, family_of, forward
from stages.models.groups import find_groups
from stages.models.layout import WEIGHTS
from stages.models.pipeline import write_pipeline
from stages.models.pruned_own import make_class
from stages.models.trust import trusting_params
from stages.runtime.errors import InputError, SignalExit
from stages.storage.files import file_sha256
from stages.storage.tensors import read_tensors
from tests.own_class import LABELS, MARK, fetched, refusal_of, write_own

FILES = (WEIGHTS, "denoiser.py", "denoiser.json", "config.json")
INIT, STEPS = "        self.width, embedding = width", "        steps = torch"


@pytest.mark.parametrize("name", FILES[1:])
def test_the_hash_covers_weights_class_description_and_config(tmp_path, name):
    """Another file of these beside the same weights is not what the hash pins."""
    unet = write_own(tmp_path / "own") / "unet"
    sha256 = file_sha256(*(unet / each for each in FILES))
    if name == "denoiser.py":
        fetch_model(FolderModel(source="folder", path=tmp_path / "own", trust=True, sha256=sha256), tmp_path / "model")
    more = MARK.format(marker=str(tmp_path / "ran")) if name == "denoiser.py" else "\n"
    (unet / name).write_text((unet / name).read_text() + more)
    message = refusal_of(tmp_path / "own", tmp_path / "again", sha256=sha256)

    assert f"expected {sha256}" in message
    assert not (tmp_path / "ran").exists()


def test_the_file_that_was_hashed_is_the_one_that_runs(tmp_path, monkeypatch):
    """A file that is exchanged between the check of the hash and the run does not run."""
    unet = write_own(tmp_path / "own") / "unet"
    check = fetch_module.check_sha256

    def exchange(*arguments):
        check(*arguments)
        path = unet / "denoiser.py"
        path.write_text(path.read_text() + MARK.format(marker=str(tmp_path / "ran")))

    monkeypatch.setattr(fetch_module, "check_sha256", exchange)
    message = refusal_of(tmp_path / "own", tmp_path, sha256=file_sha256(*(unet / each for each in FILES)))

    assert "when the model was checked" in message
    assert not (tmp_path / "ran").exists()


def test_a_file_beside_a_class_of_diffusers_is_no_own_class(tmp_path, unet, scheduler):
    """The hash is that of the weights alone, and old names of attention become the current ones."""
    write_pipeline(tmp_path / "model", unet, scheduler)
    place = tmp_path / "model" / "unet"
    (place / "denoiser.py").write_text(MARK.format(marker=str(tmp_path / "ran")))
    source = FolderModel(source="folder", path=tmp_path / "model", trust=True, sha256=file_sha256(place / WEIGHTS))
    fetch_model(source, tmp_path / "out")
    torch.save({"mid.attention.query.weight": torch.ones(1)}, place / BIN)
    (place / WEIGHTS).unlink()
    with with_safetensors(tmp_path / "model", tmp_path) as folder:
        names = list(read_tensors(folder / "unet" / WEIGHTS))

    assert names == ["mid.attention.to_q.weight"]
    assert not (tmp_path / "ran").exists()


def test_trust_is_a_switch_of_sources_that_may_bring_code():
    """It is absent from the record of a source that is not trusted."""
    assert "trust" not in FolderModel(source="folder", path="model").model_dump()
    assert HubModel(source="hub", repo="a/b", revision="a" * 40, trust=True).model_dump()["trust"] is True


@pytest.mark.parametrize("value", ['"true"', '"yes"', "on", "1", "1.0", "[true]"])
def test_nothing_but_true_is_trust(tmp_path, value):
    """No text and no number passes for true, in the source and in the params file of a later stage."""
    (tmp_path / "params.yaml").write_text(f"fetch: {{model: {{trust: {value}}}}}")
    plain = {"on": "on", "[true]": [True]}.get(value, value.strip('"') if '"' in value else None)
    with pytest.raises(ValidationError):
        FolderModel(source="folder", path="model", trust=float(value) if plain is None else plain)
    with pytest.raises(InputError, match="trust"), trusting_params(tmp_path / "params.yaml"):
        pass


@pytest.mark.parametrize(
    ("old", "reason"), [(INIT, "the constructor of ResidualUNet raises SystemExit"), (STEPS, "SystemExit: 0")]
)
def test_code_that_ends_the_program_is_refused(tmp_path, old, reason):
    """As it would for an exception; else the program ended with exit code 0 as if all was done."""
    write_own(tmp_path / "own", code={old: f"        raise SystemExit(0)\n{old}"})

    assert reason in refusal_of(tmp_path / "own", tmp_path)


def test_code_that_ends_the_program_once_it_is_cut_is_refused(tmp_path):
    """The proof runs models of other widths, for which the code may have a way out of its own."""
    leave = f"        if len(self.head.weight[0]) != self.width:\n            raise SystemExit(0)\n{STEPS}"
    write_own(tmp_path / "own", code={STEPS: leave})

    assert "SystemExit: 0" in refusal_of(tmp_path / "own", tmp_path)


def test_a_signal_in_the_code_of_a_model_is_none_of_its_faults(tmp_path):
    """It ends the program, also in the middle of forward; no stage calls it a mistake of the model."""
    end = "        from stages.runtime.errors import SignalExit\n        raise SignalExit(143)\n"
    write_own(tmp_path / "own", code={STEPS: f"{end}{STEPS}"})

    with pytest.raises(SignalExit):
        fetched(tmp_path / "own", tmp_path / "place")


STOP = "import math\n\n\nclass Stop(BaseException):\n    pass\n\n\nMADE = []"
SECOND = f"        MADE.append(1)\n        if len(MADE) > 1:\n            raise {{}}('no')\n{INIT}"


@pytest.mark.parametrize("name", ["SystemExit", "Stop", "GeneratorExit", "ValueError"])
def test_a_constructor_that_fails_only_when_it_runs_again_is_refused(tmp_path, name):
    """The class is built anew for the dense config; that is refused as the first time is, whatever it raises."""
    write_own(tmp_path / "own", code={"import math": STOP, INIT: SECOND.format(name)})

    assert f"denoiser.py: the constructor of ResidualUNet raises {name}: no" in refusal_of(tmp_path / "own", tmp_path)


@pytest.mark.parametrize("place", [INIT, STEPS])
def test_an_interrupt_is_not_taken_for_a_mistake_of_the_code(tmp_path, place):
    """Ctrl-C in a constructor or in forward ends the program as everywhere."""
    write_own(tmp_path / "own", code={place: f"        raise KeyboardInterrupt\n{place}"})
    with pytest.raises(KeyboardInterrupt):
        fetched(tmp_path / "own", tmp_path / "out")


@pytest.mark.parametrize("place", [INIT, STEPS, "import math"])
def test_exceptions_of_any_class_are_refused(tmp_path, place):
    """Also those that `except Exception` misses, in the file itself, in the constructor and in forward."""
    raising = f"{STOP}\nraise Stop('no')" if place == "import math" else f"        raise Stop('no')\n{place}"
    write_own(tmp_path / "own", code={"import math": STOP, place: raising})

    assert "raises Stop: no" in refusal_of(tmp_path / "own", tmp_path)


OF_BASE = "class Base(nn.Module):\n    def device(self):\n        return 'cpu'\n\n\nclass ResidualUNet(Base):"
NAMES = {
    "a base class": ({"class ResidualUNet(nn.Module):": OF_BASE}, "Base defines device"),
    "an attribute": ({INIT: f"        self.config = {{}}\n{INIT}"}, "config is a name that diffusers needs"),
    "a module": ({INIT: f"        self.device = nn.Identity()\n{INIT}"}, "device is a name that diffusers needs"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_diffusers_are_refused(tmp_path, kind):
    """Whether the class, one of its bases or its constructor has them."""
    code, reason = NAMES[kind]
    write_own(tmp_path / "own", code=code)

    assert reason in refusal_of(tmp_path / "own", tmp_path)


def test_other_names_are_free(tmp_path):
    """Attributes such as code and attention_heads are those of the class, and stay what it makes them."""
    names = ("code", "attention_heads", "code_text", "code_sha256")
    own = "".join(f"        self.{name} = '{name}'\n" for name in names)
    write_own(tmp_path / "own", code={INIT: own + INIT})
    model = fetched(tmp_path / "own", tmp_path / "a")

    assert [getattr(model, name) for name in names] == list(names)
    assert family_of(model).heads(model) == {"attention": 4}


def test_a_class_with_a_base_of_diffusers_is_an_own_class():
    """Else it would be saved as its base, without its code."""
    cls = make_class(type("Changed", (UNet2DModel,), {}))

    assert family_of(cls.__new__(cls)) is OWN


ATTENTION = {"qkv": "attention.qkv", "out": "proj", "heads": 4, "heads_attribute": "heads"}


@pytest.mark.parametrize("qkv", ["attention.qkv", "*.qkv"])
def test_an_attention_that_is_described_twice_is_refused(tmp_path, qkv):
    """By the same name, or by a glob that also matches it."""
    write_own(tmp_path / "own", description={"attention": [ATTENTION, {**ATTENTION, "qkv": qkv}]})

    assert "attention describes the module attention twice" in refusal_of(tmp_path / "own", tmp_path)


def test_two_layers_of_one_module_are_refused(tmp_path):
    """Heads are counted by module, so a second layer would share the count of the first."""
    init = "        self.norm, self.qkv, self.proj = nn"
    second = "        self.more, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)\n"
    write_own(
        tmp_path / "own",
        code={init: second + init},
        description={"attention": [ATTENTION, {**ATTENTION, "qkv": "attention.more", "out": "back"}]},
    )

    assert "twice, by attention.more and attention.qkv" in refusal_of(tmp_path / "own", tmp_path)


def test_a_protected_layer_of_queries_keys_and_values_keeps_all_heads(tmp_path):
    """It has no group, under the name that it has and under a glob."""
    for number, glob in enumerate(("attention.qkv", "attention.*")):
        write_own(tmp_path / str(number), description={"protected": ["head", glob]})
        groups = find_groups(fetched(tmp_path / str(number), tmp_path / f"out-{number}"))

        assert "attention.qkv" not in [group.root for group in groups]
        assert not any(group.attentions for group in groups)


@pytest.mark.parametrize("channels", [[1, 0], [0, 0], [-1, 1]])
def test_channels_of_the_output_are_a_range(tmp_path, channels):
    """From a first one to one behind it."""
    write_own(tmp_path / "own", description={"output": {"channels": channels}})

    assert f"channels is {channels}; allowed: [first, end]" in refusal_of(tmp_path / "own", tmp_path)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({**LABELS, "empty_label": 2}, "empty_label is 2; allowed: num_labels - 1, or null"),
        (
            {"inputs": {"sample": "x", "timestep": "when"}},
            "sample: x, timestep: when (missing a required argument: 't'",
        ),
    ],
    ids=str,
)
def test_inputs_that_the_class_does_not_have_are_refused(tmp_path, description, message):
    """The line has what is described and, of forward, what is missing."""
    write_own(tmp_path / "own", description=description)

    assert message in refusal_of(tmp_path / "own", tmp_path)


def test_conditions_are_those_of_the_description(tmp_path):
    """None is dropped, and none is left out."""
    plain = fetched(write_own(tmp_path / "plain"), tmp_path / "a")
    own = write_own(tmp_path / "labels", config={"num_labels": 5}, description=LABELS)
    labelled = fetched(own, tmp_path / "b")
    inputs = example_inputs(plain)

    with pytest.raises(ValueError, match="inputs of the description has neither"):
        forward(plain, {**inputs, "class_labels": torch.tensor([1])})
    with pytest.raises(ValueError, match="forward needs y"):
        forward(labelled, inputs)
