"""Architectures and networks that tests run on, plans, inputs, and helpers for several tests."""

import copy
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from families import LAYERS as LAYERS
from families import TINY, family_model, heads_of
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_layerfuse import Drop, Fuse, Linearize, MergeConvs, Plan, architecture_for
from hf_layerfuse.evaluation.divergence import prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.architectures import ARCHITECTURES, ConvGraphArchitecture
from hf_layerfuse.plan import CONV_GRAPH_KINDS

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "CONTRIBUTING.md"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# one architecture for each layout of blocks: the contract tests run on all of `TINY`, most others on these
LAYOUTS = [
    "gpt2",  # queries, keys and values in one map, stored transposed; the norm in front of the block
    "bert",  # the norm behind the block; roberta has the same table
    "distilbert",  # as bert, with each block in one module and the norms beside them
    "vit",  # images, no tokens; the norm in front of the block; deit has the same layout
    "llama",  # a gate, rotary positions, grouped heads; mistral and qwen2 have the same table
    "qwen3",  # as llama, with norms on queries and keys
]


def in_turn(choices, firsts=LAYOUTS[:1], rest=LAYOUTS[1:]) -> list[tuple]:
    """Every choice on each of the first names, and one, the next each time, on each of the rest."""
    choices = list(choices)
    return [(name, choice) for name in firsts for choice in choices] + [
        (name, choices[i % len(choices)]) for i, name in enumerate(rest)
    ]


def slow_unless(quick, cases) -> list:
    """Cases as parameters of a test, of which those that `quick(*case)` is false for run with the slow tests."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in cases]


def few_pairs(firsts, seconds) -> set[tuple]:
    """A few pairs of two lists, with each of both in at least one, for tests whose other pairs are slow."""
    firsts, seconds = list(firsts), list(seconds)
    length = max(len(firsts), len(seconds))
    return {(firsts[i % len(firsts)], seconds[i % len(seconds)]) for i in range(length)}


def slow_except(quick, names=LAYOUTS) -> list:
    """Names as parameters of a test, of which all but the quick ones run with the slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


# one plan for each kind of edit, for models of six layers
EDITS = {
    "depth": (Fuse("layer", (1, 2), operator="mean"), Fuse("layer", (3, 4), operator="telescope")),
    "share": (Fuse("layer", (1, 3), "share", "mean"), Fuse("layer", (2, 4, 5), "share", "freeze")),
    "attention": (Fuse("attention", (0, 1)), Drop("attention", 3), Fuse("attention", (4, 5), "share")),
    "mlp": (Fuse("mlp", (1, 2, 3), operator="mean"), Drop("mlp", 5), Fuse("mlp", (0, 4), "share")),
    "drop": (Drop("layer", 0), Drop("layer", 4)),
    "relaxed": (Fuse("layer", (1, 3), "share", "mean", rank=2), Fuse("layer", (0, 2, 4), "basis", rank=6)),
    "linear": (Linearize(1), Fuse("layer", (2, 3)), Fuse("attention", (4, 5), "share"), Linearize(4)),
}
STOCK = {"depth", "drop"}
"""Edits whose results have the stock class."""


HEADS = [(model_type, head) for model_type in TINY for head in heads_of(model_type)]


def tiny_model(model_type: str, head: type[PreTrainedModel] | str | None = None, seed: int = 0, **changes):
    """A random model of an architecture of `TINY`, of its first class by default."""
    head = head or heads_of(model_type)[0]
    return family_model(model_type, head if isinstance(head, str) else head.__name__, seed, **changes)


def some_batches(model: PreTrainedModel, count: int = 6) -> list[dict[str, torch.Tensor]]:
    """Batches of two random sequences or images each, the same every time."""
    torch.manual_seed(1)
    return [dummy_inputs(model, 2) for _ in range(count)]


def predicted(model: PreTrainedModel) -> torch.Tensor:
    """Output of a model for random inputs, in its data type."""
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in dummy_inputs(model).items()}
    with torch.inference_mode():
        return prediction(model(**inputs))


def cifar_resnet():
    """The residual networks of `benchmarks/cifar_resnet.py`, which registers them from outside the package."""
    path = ROOT / "benchmarks" / "cifar_resnet.py"
    spec = importlib.util.spec_from_file_location("cifar_resnet", path)
    module = sys.modules.setdefault("cifar_resnet", importlib.util.module_from_spec(spec))
    if "cifar_resnet" not in ARCHITECTURES:
        spec.loader.exec_module(module)
    return module


GATED = sorted(name for name in TINY if not {"gate", "gate_in"}.isdisjoint(ARCHITECTURES[name].mlp))
"""Architectures whose MLPs have a gate."""


CIFAR = cifar_resnet()


_RESNET = {"depths": [2, 3, 2], "hidden_sizes": [8, 16, 16], "embedding_size": 8, "image_size": 48, "num_labels": 3}


_MOBILE = {"depth_multiplier": 0.25, "depth_divisible_by": 4, "min_depth": 4, "expand_ratio": 2, "image_size": 48}


# one row per convolutional network: its class and its config
NETWORKS = {
    "basic": (ResNetForImageClassification, ResNetConfig(layer_type="basic", **_RESNET)),
    "bottleneck": (ResNetForImageClassification, ResNetConfig(**_RESNET)),
    "stride in the first": (ResNetForImageClassification, ResNetConfig(downsample_in_bottleneck=True, **_RESNET)),
    "mobilenet": (MobileNetV2ForImageClassification, MobileNetV2Config(num_labels=3, **_MOBILE)),
    "symmetric": (MobileNetV2ForImageClassification, MobileNetV2Config(num_labels=3, tf_padding=False, **_MOBILE)),
    "dilated": (MobileNetV2ForImageClassification, MobileNetV2Config(num_labels=3, output_stride=8, **_MOBILE)),
    "cifar": (
        CIFAR.CifarResNetForImageClassification,
        CIFAR.CifarResNetConfig(num_hidden_layers=6, widths=[4, 4, 4, 8, 8, 8], num_labels=3),
    ),
}


_VARIANTS = ("symmetric", "dilated", "stride in the first")


CONV_GRAPHS = [pytest.param(name, marks=pytest.mark.slow) if name in _VARIANTS else name for name in NETWORKS]
"""Variants of networks that are tested too are left to the longer run."""


@cache
def network(name: str):
    """A random model in float64. Its norms have statistics of images, so that their outputs have size one."""
    make, config = NETWORKS[name]
    torch.manual_seed(0)
    model = make(copy.deepcopy(config)).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None
    with torch.no_grad():
        for seed in range(3):
            model(**dummy_inputs(model, 8, seed=seed))
    return model.eval()


WHOLE = {"gpt2": "GPT2LMHeadModel", "vit": "ViTModel", "deit": "DeiTModel"}


def whole(model_type, layers=4, **changes):
    """A model with an output of many dimensions, whose loss is reliable with few sequences."""
    return tiny_model(model_type, WHOLE.get(model_type), num_hidden_layers=layers, **changes)


def batches_of(model, *sizes, tokens=12):
    """Calibration batches of these sizes, every third sequence of tokens padded on the right."""
    found = []
    for seed, size in enumerate(sizes or (16, 8)):
        batch = dummy_inputs(model, size, tokens, seed=seed)
        if "input_ids" in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][::3, ..., 9:] = 0
        found.append(batch)
    return found


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def conv_graph_of(model):
    return architecture_for(model, ConvGraphArchitecture).convolutions(model).graph(model)


def merge_plan(model, *edits) -> Plan:
    architecture = architecture_for(model, ConvGraphArchitecture)
    return Plan(architecture.model_type, len(architecture.convolutions(model).units), edits, kinds=CONV_GRAPH_KINDS)


def some_merge_plan(model, seed: int, merged: bool = True) -> Plan:
    """A plan of consecutive segments of two or more convolutions, with any of their kernels."""
    chance, graph, edits, at = random.Random(seed), conv_graph_of(model), [], 0
    while at < graph.length:
        ends = [j for i, j in graph.segments() if i == at and j > at + 1]
        if ends and chance.random() < 0.8:
            end = chance.choice(ends)
            edits.append(MergeConvs(at, end, chance.choice(list(graph.kernels(at, end).values())), merged))
            at = end
        else:
            at += 1
    return merge_plan(model, *edits)


def blocks_of(section: str) -> list[str]:
    """The Python code in a section of the guide."""
    text = GUIDE.read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```$", body, flags=re.DOTALL | re.MULTILINE)


_DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_CLIPPING": "auto",
    "ACCELERATE_USE_CPU": "false",
    "DS_ACCELERATOR": "cpu",
}


_ON_CPU = """
from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
"""
"""Accelerate knows DeepSpeed on accelerators only."""


def on_two_processes(folder: Path, program: str, *arguments: str | Path, kind: str = "MULTI_CPU") -> str:
    """Run a program on two processes of a launcher, and return their output."""
    folder.mkdir(exist_ok=True)
    path = folder / "program.py"
    path.write_text(_ON_CPU + program if kind == "DEEPSPEED" else program)
    # `accelerate launch --cpu --num_processes 2` silently runs one process
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch = _DEEPSPEED if kind == "DEEPSPEED" else {"ACCELERATE_USE_CPU": "true"}
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # DeepSpeed runs its own ninja
    environment = {**os.environ, **launch, "OMP_NUM_THREADS": "1", "PATH": programs}
    command = [*launcher, str(path), *map(str, arguments)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
