"""peft and diffusers load sliced adapters into pruned models, in an environment without this project."""

import json
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.models.branches import find_branches, removable
from stages.models.families import example_inputs, family_of
from stages.models.pipeline import write_pipeline
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.tools.lora.slicing import ADAPTED, slice_adapter
from tests.loras import SCALE, make_lora, merge

LOAD_SCRIPT = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from diffusers import AutoModel
from peft import PeftModel
assert not [name for name in sys.modules if name.startswith(("stages", "torch_pruning"))]
for folder in sorted(Path(sys.argv[1]).iterdir()):
    path = next(path.parent for path in folder.glob("model/*/pruned_*.py"))
    model = AutoModel.from_pretrained(str(path), trust_remote_code=True).eval()
    inputs = load_file(folder / "inputs.safetensors")
    before = model(**inputs).sample.detach()
    if (folder / "lora/adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, str(folder / "lora")).eval()
    else:
        model.load_lora_adapter(str(folder / "lora" / "pytorch_lora_weights.safetensors"), prefix="unet")
    outputs = {"plain": before, "adapted": model(**inputs).sample.detach()}
    save_file({name: it.contiguous() for name, it in outputs.items()}, folder / "outputs.safetensors")
"""
RANK = 3


def write_case(folder, dense, magnitude_of, scheduler, layout):
    """Write a pruned model, its sliced adapter and inputs; returns the outputs without and with the adapter."""
    removed = [removable(find_branches(dense))[0].name]
    params = PruneParams(target={"ratio": 0.3}, order="upfront")
    plan = plan_pruning(dense, magnitude_of(dense), params, removed=removed)
    layers = [name for name, module in dense.named_modules() if isinstance(module, ADAPTED) and is_peft(name, layout)]
    tensors, names = make_lora(dense, layers, layout, RANK, exact=False, bias=False)
    tensors = {name: tensor / 20 for name, tensor in tensors.items() if not name.endswith("alpha")}
    pruned, sliced = cut(dense, plan), slice_adapter(tensors, dense, plan)
    write_pipeline(folder / "model", pruned, scheduler)
    (folder / "lora").mkdir()
    name = "adapter_model" if layout == "peft" else "pytorch_lora_weights"
    save_file(sliced.tensors, folder / "lora" / f"{name}.safetensors", metadata={"format": "pt"})
    if layout == "peft":
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, "target_modules": layers}
        (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    inputs = example_inputs(pruned, 2)
    first = "hidden_states" if family_of(dense).component == "transformer" else "sample"
    inputs = {first: torch.randn(inputs.pop("sample").shape), **inputs}
    save_file(inputs, folder / "inputs.safetensors")
    dense.load_state_dict(merge(dense, tensors, names, SCALE if layout == "peft" else 1.0))
    return pruned(**inputs).sample, cut(dense, plan)(**inputs).sample


def is_peft(name, layout):
    """Leave embeddings to peft, whose LoRA diffusers does not load, and the labels of DiT, which peft cannot wrap."""
    return layout == "peft" or "embedding" not in name


@pytest.mark.network
def test_peft_and_diffusers_load_sliced_adapters(make_unet, conditional, make_dit, magnitude_of, scheduler, tmp_path):
    """The adapted pruned model draws as the adapted dense model does that is pruned by the same plan."""
    dense = {"unet": make_unet(num_class_embeds=3), "conditional": conditional, "dit": make_dit(num_layers=3)}
    layouts = {"unet": "peft", "conditional": "diffusers", "dit": "peft"}
    expected = {}
    for name, model in dense.items():
        (tmp_path / "cases" / name).mkdir(parents=True)
        expected[name] = write_case(tmp_path / "cases" / name, model, magnitude_of, scheduler, layouts[name])
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    uv = Path(sys.executable).with_name("uv")
    packages = [*(f"{name}=={version(name)}" for name in ("torch", "diffusers", "safetensors")), "peft"]
    subprocess.run([uv, "pip", "install", "--python", python, *packages], check=True, capture_output=True)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    command = [python, "-c", LOAD_SCRIPT, tmp_path / "cases"]
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    for name, (plain, adapted) in expected.items():
        found = load_file(tmp_path / "cases" / name / "outputs.safetensors")
        torch.testing.assert_close(found["plain"], plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["adapted"], adapted, rtol=1e-4, atol=1e-5)
        assert (adapted - plain).abs().max() > 0.01
