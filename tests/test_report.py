"""What a run tells its user: every kind of edit has words, and figures have their names."""

from typing import get_args

import pytest

from hf_layerfuse import Drop, Fuse, Plan
from hf_layerfuse.plan.edit import Kind, Mode
from hf_layerfuse.report import describe, rows


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_edit_has_words(kind, mode):
    """They name the layers, what becomes of them, and the rank where there is one."""
    kinds = ("conv",) if kind == "conv" else ("attention", "mlp")
    rank = 0 if mode == "depth" else 8
    plan = Plan("gpt2", 12, (Fuse(kind, (2, 3), mode, rank=rank), Drop(kind, 7)), kinds=kinds)
    fused, dropped = describe(plan)
    assert "layers 2, 3: " in fused
    assert ("8" in fused) == (rank > 0)
    assert "7: dropped" in dropped


def test_a_shared_block_without_residuals_has_none():
    (line,) = describe(Plan("gpt2", 12, (Fuse("layer", (2, 3), "share"),)))
    assert "residuals" not in line


def test_what_was_healed_before_is_not_called_fused():
    """With rounds, the last fusing starts from a healed model."""
    stage = {"parameters": 1, "non_embedding_parameters": 1, "bytes": 1, "latency_ms": None, "metrics": {}}
    results = {"before": stage, "fused": stage, "healed": stage}
    assert rows(results)[0] == ["", "before", "fused", "healed"]
    assert rows({**results, "rounds": [{}, {}]})[0] == ["", "before", "fused in the last round", "healed"]
