"""The environment and the fixtures of all tests. No test reaches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads take longer to start than a tiny model to load
os.environ.setdefault("OMP_NUM_THREADS", "1")

import re
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# before `datasets` is imported; one per worker, removed at exit
_CACHE = tempfile.TemporaryDirectory(prefix="layerfuse-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from helpers import LAYOUTS, tiny_model

from hf_layerfuse.evaluation.timing import Timed

torch.set_num_threads(1)


def _drawn_where_it_matters(draw):
    """On the meta device nothing is drawn, but every tiny model that is loaded takes a while for it."""
    return lambda layer: None if layer.weight.is_meta else draw(layer)


for _layer in (torch.nn.Linear, torch.nn.Embedding):
    _layer.reset_parameters = _drawn_where_it_matters(_layer.reset_parameters)

re._MAXCACHE = 1 << 16  # loading a model compiles about a thousand patterns, twice as many as `re` remembers


@pytest.fixture(params=LAYOUTS)
def model_type(request) -> str:
    return request.param


@pytest.fixture(
    params=["GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def causal_lm(request):
    kind = {"GPT2": "gpt2", "Llam": "llama", "Mist": "mistral"}.get(request.param[:4]) or request.param[:5].lower()
    return tiny_model(kind, request.param)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace timing: convolutions take time in proportion to their multiplications, and transformers to their
    parameters."""

    def milliseconds(name: str, run) -> float:
        if isinstance(run, partial) and not hasattr(run.func.config, "num_attention_heads"):  # convolutions
            return {"original": 1100.0, "folded": 1000.0}.get(name, 1.0)
        if isinstance(run, partial):  # tokens
            return 1e-3 * sum(p.numel() for p in run.func.parameters())
        run()
        return 1.0 if run.conv is None else 1.0 * run.conv.weight.numel() * run.shapes[0][2] ** 2

    def timed(runs, device, **_):
        return {name: Timed(milliseconds(name, run), 0.0) for name, run in runs.items()}

    monkeypatch.setattr("hf_layerfuse.evaluation.timing.interleaved", timed)


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch):
    """Reset the process-wide settings of Accelerate for every test, and use the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass
class Interruption:
    """Number of backward passes so far."""

    passes: int = 0


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch):
    """`interrupt(moment, error)` raises an error instead of one backward pass of Accelerate, counted from 1."""

    def install(moment: int, error: type[BaseException] = InterruptedError) -> Interruption:
        backward, interruption = Accelerator.backward, Interruption()

        def stop(self, loss, **options):
            interruption.passes += 1
            if interruption.passes == moment:
                raise error
            backward(self, loss, **options)

        monkeypatch.setattr(Accelerator, "backward", stop)
        return interruption

    return install


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data and checkpoints; a test that needs it is skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("LAYERFUSE_DATA", default))
    if not (path / "data").is_dir():
        pytest.skip(f"real data not found at {path}: set LAYERFUSE_DATA")
    return path
