"""Families of Transformers of which discovery finds a table, and those that it refuses, with the reason."""

import pytest
from families import FAMILIES, OTHERS, TINY, family_inputs, family_model

from hf_layerfuse import UnsupportedModelError, discover_architecture

NAMES = [*TINY, *(name for name in FAMILIES if "," not in name), "wav2vec2, stable", *OTHERS]

SEVERAL = {
    "t5": ("encoder.block", "decoder.block"),
    **dict.fromkeys(("bart", "mbart", "marian", "whisper", "detr"), ("model.encoder.layers", "model.decoder.layers")),
    **dict.fromkeys(("clip", "siglip"), ("text_model.encoder.layers", "vision_model.encoder.layers")),
    **dict.fromkeys(("llava", "gemma3"), ("model.vision_tower.encoder.layers", "model.language_model.layers")),
}
"""Families with several stacks, of which the user chooses one."""

REFUSED = {
    "albert": "run 6 times, so weights serve several depths",
    "swin": "no field of SwinConfig sets the number of layers",
    "convnext": "no field of ConvNextConfig sets the number of layers",
    "sam": "attends inside windows",
}
"""Families whose layers no table describes, and a part of the message."""

UNVERIFIED = {
    "falcon": "the layout of the attention block: a joint map of 48 rows does not fit",
    "llava model.vision_tower.encoder.layers": "run one by one, differ from the whole model",
}
"""Stacks whose table is found and does not hold, and a part of the reason."""

CASES = [(name, stack) for name in NAMES if name not in REFUSED for stack in SEVERAL.get(name, (None,))]


def test_counts():
    """Of 65 families, 4 are refused; the tables of 71 stacks are found in the others."""
    assert (len(NAMES), len(REFUSED), len(CASES)) == (65, 4, 71)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stack"), CASES)
def test_discovery_finds_a_table(name, stack):
    """The table is verified, except for the stacks in UNVERIFIED."""
    model = family_model(name)
    found = discover_architecture(model, family_inputs(name, model), stack=stack)
    expected = UNVERIFIED.get(name if stack is None else f"{name} {stack}")
    if expected is None:
        assert not found.unverified
        assert found.source()
    else:
        assert any(expected in why for why in found.unverified), found.unverified


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_several_stacks_are_asked_for(name):
    """Without `stack=`, the error lists the stacks to choose from."""
    model = family_model(name)
    with pytest.raises(UnsupportedModelError, match="has several stacks of layers: pass stack=") as refused:
        discover_architecture(model, family_inputs(name, model))
    assert all(
        f"({stack}, {len(model.get_submodule(stack))} layers, config." in str(refused.value) for stack in SEVERAL[name]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_was_found(name):
    """A model whose layers no table describes is refused, and the message says why."""
    model = family_model(name)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        discover_architecture(model, family_inputs(name, model))
