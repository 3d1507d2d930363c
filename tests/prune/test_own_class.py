"""A class that diffusers does not have: what is cut, what is refused, and that code runs only where it is trusted."""

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoModel
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from flows.initialise import init
from stages.costs.__main__ import main as costs
from stages.evaluate.__main__ import main as evaluate
from stages.fetch.__main__ import main as fetch
from stages.finetune.__main__ import main as finetune
from stages.grid.__main__ import main as grid
from stages.importance.__main__ import main as importance
from stages.models.complexity import count_macs
from stages.models.families import example_inputs, family_of
from stages.models.groups import find_groups
from stages.models.layout import WEIGHTS
from stages.models.masking import TOLERANCE, masked, relative_error
from stages.models.pipeline import read_unet, write_pipeline
from stages.models.plan import architecture_sha256
from stages.models.trust import trusting
from stages.params import Params
from stages.prune.__main__ import main as prune
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut, verify
from stages.reference.__main__ import main as reference
from stages.register import package
from stages.rounds.__main__ import main as rounds
from stages.runtime.errors import InputError
from stages.tools.__main__ import main as tools
from stages.tools.planning.preview import preview
from stages.variants.__main__ import main as variants
from tests.markdown import blocks
from tests.own_class import EXAMPLE, LABELS, MARK, fetched, refusal_of, write_own

BY_HEAD = {
    "unflatten(2, (3, self.heads, -1))": "unflatten(2, (self.heads, 3, -1))",
    "permute(2, 0, 3, 1, 4)": "permute(3, 0, 2, 1, 4)",
}
"""The example with the queries, keys and values of each head beside each other."""
ATTENTION = {"qkv": "attention.qkv", "out": "proj", "heads": 4, "heads_attribute": "heads"}


@pytest.mark.parametrize("first", ["part", "head"])
def test_whole_heads_of_a_fused_layer_are_cut(tmp_path, magnitude_of, scheduler, first):
    """Rows of q, k and v of one head go together, in either order; saved and opened the model gives the same bits."""
    code = BY_HEAD if first == "head" else {}
    write_own(tmp_path / "own", code=code, description={"attention": [{**ATTENTION, "first": first}]})
    unet = fetched(tmp_path / "own", tmp_path / "a")
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.5}))
    pruned = cut(unet, plan)
    write_pipeline(tmp_path / "pruned", pruned, scheduler)
    with trusting(is_trusted=True):
        loaded = read_unet(tmp_path / "pruned")
    plain = AutoModel.from_pretrained(str(tmp_path / "pruned" / "unet"), trust_remote_code=True).eval()
    inputs = {**example_inputs(unet, 2), "sample": torch.randn(2, 1, 16, 16), "timestep": torch.tensor([3, 700])}
    rows, width = plan.layers["attention.qkv"].outputs, 32 // 4
    kept = [row // (3 * width) for row in rows] if first == "head" else [row % 32 // width for row in rows]

    assert plan.heads == {"attention": 2}
    assert {head: kept.count(head) for head in kept} == dict.fromkeys(kept, 3 * width)
    assert plan.layers["attention.proj"].inputs == [c for c in range(32) if c // width in kept]
    assert loaded.attention.heads == plain.attention.heads == 2
    assert torch.equal(loaded(**inputs).sample, pruned(**inputs).sample)
    assert torch.equal(plain(**inputs).sample, pruned(**inputs).sample)
    assert plan.base.family.startswith("ResidualUNet of denoiser.py ")


def test_a_pruned_model_equals_the_masked_dense_one(tmp_path, magnitude_of):
    """Norms take their statistics from the kept channels; with one channel more or less the two differ."""
    write_own(tmp_path / "own")
    unet = fetched(tmp_path / "own", tmp_path / "a")
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.3}))
    sides = {(n, d): side for n, kept in plan.layers.items() for d, side in enumerate((kept.outputs, kept.inputs))}
    kept = {side: torch.tensor(channels) for side, channels in sides.items() if channels is not None}
    wrong = {**kept, ("up.conv2", 1): torch.arange(len(kept["up.conv2", 1]))}
    pruned = cut(unet, plan)

    assert relative_error(unet, pruned, kept) < 1e-5
    assert relative_error(unet, pruned, wrong) > TOLERANCE
    assert masked(unet, {}).state_dict().keys() == unet.state_dict().keys()


def test_a_last_layer_of_zeros_hides_no_mistake(tmp_path, magnitude_of):
    """Its outputs are equal whatever is cut, so the cut is compared with random weights as well."""
    write_own(tmp_path / "own")
    unet = fetched(tmp_path / "own", tmp_path / "a")
    with torch.no_grad():
        unet.head.weight.zero_()
        unet.head.bias.zero_()
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.5}))
    pruned = cut(unet, plan)
    verify(unet, pruned, plan)
    family_of(pruned).set_heads(pruned, {"attention": 1})

    with pytest.raises(InputError, match="differs by"):
        verify(unet, pruned, plan)


WITH_CONFIG = "    config = None\n\n    def forward(self, x: torch.Tensor, t:"
WRONG = {
    "undescribed attention": ({"description": {"attention": None}}, "attention.qkv", "cannot be"),
    "other order of parts": (
        {"description": {"attention": [{**ATTENTION, "first": "head"}]}},
        "attention.qkv (with attention.proj)",
        "differs by",
    ),
    "other heads": ({"description": {"attention": [{**ATTENTION, "heads": 2}]}}, "attention.heads is 4", "2"),
    "heads not noted": (
        {"description": {"attention": [{**ATTENTION, "heads_attribute": None}]}},
        "attention.qkv",
        "cannot be cut alone",
    ),
    "other output layer": (
        {"description": {"attention": [{**ATTENTION, "out": "norm"}]}}, "out attention.norm", "Conv2d"
    ),
    "unknown layer": ({"description": {"protected": ["haed"]}}, "protected haed", "did you mean head"),
    "unprotected output": ({"description": {"protected": ["stem"]}}, "head", "protected"),
    "wrong noise output": ({"description": {"output": {"attribute": "eps"}}}, "output.attribute is eps", "Tensor"),
    "whole output": ({"description": {"output": {}}}, "forward gives (3, 2, 16, 16)", "(3, 1, 16, 16)"),
    "unknown key": ({"description": {"outputs": {}}}, "outputs is not a known key", "did you mean output"),
    "no such input": ({"description": {"inputs": {"sample": "image", "timestep": "t"}}}, "takes x, t, y", "image"),
    "unknown feature": ({"description": {"features": {"middel": None}}}, "features middel", "middle"),
    "unknown key of the config": ({"config": {"depth": 3}}, "config.json", "depth"),
    "no size": ({"config": {"sample_size": None}}, "sample_size None", "positive integer"),
    "class not in the file": (
        {"config": {"_class_name": "ResUNet"}}, "no class ResUNet", "Block, Attention, ResidualUNet"
    ),
    "weights of another width": ({"config": {"width": 8}}, "the weights do not fit the config", "size mismatch"),
    "raises in the constructor": (
        {"code": {"self.width, embedding = width": "raise KeyError('width')\n        self.width, embedding = width"}},
        "the constructor of ResidualUNet raises KeyError",
        "width",
    ),
    "raises in forward": (
        {"code": {"steps = torch": "raise RuntimeError('no')\n        steps = torch"}}, "does not run at", "(no)"
    ),
    "missing import": (
        {"code": {"import math": "import math, no_such_package"}}, "ModuleNotFoundError", "no_such_package"
    ),
    "syntax": ({"code": {"import math": "import math("}}, "SyntaxError", "denoiser.py"),
    "exit": ({"code": {"import math": "import math\nraise SystemExit(0)"}}, "SystemExit", "denoiser.py"),
    "reads values": (
        {"code": {"steps = torch": "assert float(t[0]) >= 0\n        steps = torch"}}, "does not run", "read no values"
    ),
    "channels summed": (
        {"code": {"(hidden, size=skip.shape[2:])": "(hidden, size=skip.shape[2:]) + skip.mean(1, True)"}},
        "stem",
        "differs by",
    ),
    "a weight of no layer": (
        {
            "code": {
                "self.stem(x), embedding)": "self.scale * self.stem(x), embedding)",
                "self.stem = nn": "self.scale = nn.Parameter(torch.ones(1, width, 1, 1))\n        self.stem = nn",
            }
        },
        "also those of a parameter (1, 16, 1, 1) of no layer",
        "protected",
    ),
    "a norm without weights": (
        {
            "code": {
                "self.stem(x), embedding)": "self.plain(self.stem(x)), embedding)",
                "self.stem = nn": "self.plain = nn.GroupNorm(4, width, affine=False)\n        self.stem = nn",
            }
        },
        "also those of plain, a GroupNorm without weights",
        "to protected",
    ),
    "a name of diffusers": (
        {"code": {"    def forward(self, x: torch.Tensor, t:": WITH_CONFIG}},
        "config", "rename",
    ),
}  # fmt: skip
"""Mistake -> changes of the example, and two parts of the line that refuses it."""


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_refused_in_one_line(tmp_path, mistake):
    """The line names what is wrong; nothing is written."""
    changes, one, other = WRONG[mistake]
    write_own(tmp_path / "own", **changes)
    if mistake == "weights of another width":
        write_own(tmp_path / "wide")
        (tmp_path / "wide" / "unet" / WEIGHTS).replace(tmp_path / "own" / "unet" / WEIGHTS)
    if mistake == "a weight of no layer":
        tensors = load_file(tmp_path / "own" / "unet" / WEIGHTS)
        save_file({**tensors, "scale": torch.ones(1, 16, 1, 1)}, tmp_path / "own" / "unet" / WEIGHTS)
    message = refusal_of(tmp_path / "own", tmp_path)

    assert one in message
    assert other in message


def test_macs_count_every_call_of_a_layer(tmp_path, magnitude_of):
    """A block that runs twice costs twice, so that a budget in MACs is that of the pruned model."""
    twice = {"self.attention(self.middle(": "self.attention(self.middle(self.middle("}
    twice |= {"self.reduce(skip), embedding))": "self.reduce(skip), embedding), embedding))"}
    unet = fetched(write_own(tmp_path / "own", code=twice), tmp_path / "a")
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"macs": "50%"}))

    assert plan.budget.found == count_macs(cut(unet, plan))
    assert plan.budget.dense == count_macs(unet)


def test_labels_out_of_range_are_refused(tmp_path):
    """A description with more labels than the class embeds."""
    write_own(tmp_path / "own", config={"num_labels": 4}, description=LABELS)

    assert "does not run at the timesteps" in refusal_of(tmp_path / "own", tmp_path)


def test_an_unknown_class_names_the_way_and_the_code_belongs_to_the_identity(tmp_path):
    """Without denoiser.py one line names it; another text of the same class is another architecture."""
    write_own(tmp_path / "own")
    write_own(tmp_path / "other", code={"import math": "import math  # 2"})
    one, other = (fetched(tmp_path / name, tmp_path / f"{name}-out") for name in ("own", "other"))
    (tmp_path / "own" / "unet" / "denoiser.py").unlink()
    message = refusal_of(tmp_path / "own", tmp_path)

    assert "describes a ResidualUNet; supported: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel" in message
    assert "docs/how-to/own-class.md" in message
    assert architecture_sha256(one) != architecture_sha256(other)


def write_marked_project(tmp_path, root, marker):
    """Write a model whose code leaves a mark when it runs, as source and as fetched, and the params; return these."""
    write_own(tmp_path / "source")
    fetched(tmp_path / "source", tmp_path / "in")
    for folder in (tmp_path / "source", tmp_path / "in" / "model"):
        path = folder / "unet" / "denoiser.py"
        path.write_text(path.read_text() + MARK.format(marker=str(marker)))
    (tmp_path / "in" / "model").rename(tmp_path / "model")
    text = (
        (root / "params.yaml")
        .read_text()
        .replace("{source: bundled, name: digits}", "{source: folder, path: source}", 1)
        .replace("rounds: {count: 1,", "rounds: {count: 2,")
        .replace("variants: null", "variants: {kinds: [int8]}")
    )
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "pretrained").symlink_to(tmp_path / "model")
    return Params.model_validate(YAML(typ="safe").load(text))


def test_code_runs_in_no_command_without_trust(tmp_path, root, monkeypatch):
    """A file that leaves a mark when it runs: init, plan, the stages that open models, grid, draw, export, register."""
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "ran"
    params = write_marked_project(tmp_path, root, marker)
    folders = "--dense model --pruned model --finetuned model --report r"
    calls = {
        fetch: "--model-out o --data-out d",
        reference: "--model model --data data --out o",
        importance: "--model model --data data --out o --report r",
        prune: "--model model --importance data --data data --out o",
        rounds: "--model model --importance data --data data --checkpoints c --out rounds",
        finetune: "--model model --rounds model --teacher model --data data --checkpoints c --out o --report r",
        evaluate: f"{folders} --reference data",
        costs: folders,
        variants: f"{folders} --reference data --out v",
        grid: "--artifacts models --out g --store s",
        tools: "draw --model model --out o",
        init: "--model source --data bundled:digits --out new.yaml",
    }
    outputs = {command: CliRunner().invoke(command, words.split()) for command, words in calls.items()}
    exported = CliRunner().invoke(tools, ["export", "--model", "model", "--out", "o"])

    assert params.fetch.model.trust is False
    for command, result in outputs.items():
        assert result.exit_code == 1, (calls[command], result.output, result.exception)
        assert "set fetch.model.trust: true in params.yaml" in result.output, (calls[command], result.output)
    assert "own class" in exported.output
    assert any("set fetch.model.trust: true" in line for line in preview(params).refusals)
    for read in (read_unet, package._describe_context):  # the second is the part of register that opens the model
        with pytest.raises(InputError, match=r"set fetch\.model\.trust"):
            read(tmp_path / "model")
    assert not marker.exists()


def test_the_example_is_what_the_page_shows(root):
    """The how-to shows the class and its description as the files in recipes have them."""
    page = "docs/how-to/own-class.md"
    shown = [block.text for block in blocks(page, "json")]

    assert shown == [(EXAMPLE / "unet" / name).read_text() for name in ("config.json", "denoiser.json")]
    assert "recipes/own_class/unet/denoiser.py" in (root / page).read_text()


def test_the_groups_of_the_example(tmp_path):
    """Coupled through additions, the concatenation of the skip, norms and the fused attention."""
    write_own(tmp_path / "own")
    groups = {group.root: group for group in find_groups(fetched(tmp_path / "own", tmp_path / "a"))}

    assert groups["attention.qkv"].whole
    assert groups["attention.qkv"].attentions == ("attention",)
    assert "head" not in groups
    assert {"stem", "down.conv2"} <= set(groups["stem"].producers())
