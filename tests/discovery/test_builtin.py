"""Discovery finds every hand-written table of the package."""

import pytest
from families import FAMILIES, TINY, family_inputs, family_model, model_type_of

from hf_layerfuse import TransformerArchitecture, architecture_for, discover_architecture
from hf_layerfuse.discovery.blocks import MEANINGS
from hf_layerfuse.models.architectures import ARCHITECTURES, BUILTIN

VARIANTS = ("wav2vec2, stable", "gpt2, cross-attention", "bert, cross-attention")

TABLES = [
    (name, table.stack)
    for name in (*TINY, *(name for name in FAMILIES if "," not in name), *VARIANTS)
    if isinstance(hand := ARCHITECTURES[model_type_of(name)], TransformerArchitecture)
    for table in (hand, *hand.other_stacks)
]

_FIRST = {"mlp, placeholders": "the first of three parts becomes zero instead of the last one, which gives the same"}
_OUTPUTS = {"attention, placeholders": "the placeholder returns as many values as the module"}

EXPLAINED = {
    "opt": _FIRST,
    "bart": _FIRST,
    "mbart": _FIRST,
    "marian": _FIRST,
    "whisper": _FIRST,
    "t5": _OUTPUTS,
    "t5, decoder": {**_OUTPUTS, "cross, placeholders": _OUTPUTS["attention, placeholders"]},
    "falcon": {"joint": "the config does not state the number of key-value heads, so the layout is not verified"},
    "gemma3": {"stack": "the hand-written table describes the language model alone"},
    "bloom": {
        "attention, placeholders": "a general placeholder adds the residual",
        "mlp, placeholders": "a general placeholder adds the residual",
    },
}
"""Family -> field -> reason for a difference between both tables."""


def differences(model, hand, found) -> dict[str, tuple]:
    """Field -> (hand-written, discovered), for the fields in which two tables differ."""
    config, different = hand.config_of(model.config), {}

    def same(field, ours, theirs):
        if ours != theirs:
            different[field] = (ours, theirs)

    for kind in hand.kinds:
        ours, theirs = hand.table(kind), found.table(kind)
        for role in sorted(MEANINGS):
            same(f"{kind}.{role}", ours.get(role), theirs.get(role))
        other = [{path for role, path in table.items() if role not in MEANINGS} for table in (ours, theirs)]
        same(f"{kind}, other parts", *other)
        same(f"{kind}, skip", *(set(each.skip[kind]) for each in (hand, found)))
        same(f"{kind}, placeholders", *(dict(each.skip[kind]) for each in (hand, found)))
        silent = [{path.removesuffix(".weight") for path in each.silent.get(kind, ())} for each in (hand, found)]
        same(f"{kind}, silent", *silent)
    fields = ("kinds", "layers", "activation", "adds", "parallel", "between", "post_norm", "config", "fixed")
    fields += ("also_positions", "joint", "pairing", "bound_heads", "stack", "mask")
    for field in fields:
        same(field, getattr(hand, field), getattr(found, field))
    real = type(config).attribute_map
    same("depth", *(real.get(each.depth, each.depth) for each in (hand, found)))
    lists = [
        {name for name in each.per_layer_config if getattr(config, name, None) is not None} for each in (hand, found)
    ]
    same("per_layer_config", *lists)
    return different


def test_every_transformer_of_the_package_has_a_family():
    """The tests below run on every hand-written table."""
    known = {each.model_type for each in BUILTIN if issubclass(each, TransformerArchitecture)}
    assert known <= {name for name, _ in TABLES}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stack"), TABLES)
def test_discovery_finds_the_hand_written_table(name, stack):
    """The discovered table equals the hand-written one field by field, except for the differences in EXPLAINED."""
    row = f"{name}, {stack}"  # with as many layers in this stack
    model = family_model(row if row in FAMILIES else name)
    hand = architecture_for(model, stack=stack)
    found = discover_architecture(model, family_inputs(name, model), stack=hand.layers_path(model))
    different = differences(model, hand, found.architecture()())
    assert different.keys() == EXPLAINED.get(row, EXPLAINED.get(name, {})).keys(), different
