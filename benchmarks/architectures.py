"""What works on each family of transformers: contract, edits, searches and cache on tiny random models.

    python benchmarks/architectures.py [FAMILY ...] [--threads 2]

Each family is a row of `TINY` or `FAMILIES` in tests/families.py; rows of one `model_type` are its variants. Models of
`OTHERS` have no table of their own, and `fuse` says what it does with them. Writes
benchmarks/results/architectures.json, after each family; with names, only their rows are measured anew.
"""

import argparse
import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from common import RESULTS, ROOT, load, parsed, save
from transformers import PreTrainedModel

from hf_layerfuse import Drop, Fuse, LayerFuseError, apply, collapse, fuse, verify
from hf_layerfuse.calibration.contract import check_contract
from hf_layerfuse.models.architectures import ARCHITECTURES, BUILTIN

sys.path.insert(0, str(ROOT / "tests"))
families = importlib.import_module("families")

PATH = RESULTS / "architectures.json"

SEARCHES: dict[str, dict[str, Any]] = {
    "depth": {"keep_layers": 3},
    "share": {"keep_layers": 3, "mode": "share", "rank": 2},
    "attention": {"ratio": 0.5, "blocks": "attention"},
    "MLP": {"keep_layers": 3, "blocks": "mlp"},
    "collapse": {"count": 2},
}
"""What each search is asked for, by the name of its column. All have calibration batches and the lower effort."""

WORKS = "works"

EXAMPLES = {
    "gpt2": "GPT-2, DistilGPT2",
    "bert": "BERT, MiniLM, BGE, E5",
    "roberta": "RoBERTa, all-distilroberta",
    "distilbert": "DistilBERT",
    "vit": "ViT-B/16",
    "deit": "DeiT",
    "llama": "Llama 2 and 3, SmolLM2, TinyLlama",
    "mistral": "Mistral 7B",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3 3B",
    "granite": "Granite 3",
    "starcoder2": "StarCoder2",
    "olmo2": "OLMo 2",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M and 1B",
    "gemma3": "Gemma 3 4B, 12B and 27B: the language model",
    "mixtral": "Mixtral 8x7B",
    "qwen3_moe": "Qwen3-30B-A3B",
    "gpt_neo": "GPT-Neo, TinyStories",
    "gpt_neox": "Pythia, GPT-NeoX-20B",
    "bloom": "BLOOM, BLOOMZ",
    "falcon": "Falcon 7B and 40B",
    "clip": "CLIP",
    "siglip": "SigLIP",
    "qwen3_next": "Qwen3-Next 80B-A3B",
    "qwen3_5_text": "Qwen3.5: the language model",
    "mamba": "Mamba 130M to 2.8B",
    "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-4",
    "cohere": "Command R, Aya",
    "glm4": "GLM-4-0414",
    "modernbert": "ModernBERT",
    "opt": "OPT",
    "xlm-roberta": "XLM-RoBERTa, BGE-M3, multilingual E5",
    "camembert": "CamemBERT",
    "electra": "ELECTRA",
    "mpnet": "MPNet, all-mpnet-base",
    "deberta-v2": "DeBERTa v2 and v3",
    "nomic_bert": "nomic-embed-text",
    "t5": "T5, Flan-T5",
    "bart": "BART",
    "mbart": "mBART",
    "marian": "OPUS-MT",
    "whisper": "Whisper",
    "wav2vec2": "wav2vec 2.0, XLS-R",
    "hubert": "HuBERT",
    "clip_vision_model": "CLIP: the image tower",
    "clip_text_model": "CLIP: the text tower",
    "siglip_vision_model": "SigLIP: the image tower",
    "siglip_text_model": "SigLIP: the text tower",
    "vit_mae": "ViT-MAE",
    "dinov2": "DINOv2",
    "dinov3_vit": "DINOv3 ViT",
    "beit": "BEiT",
}
"""Checkpoints that people know, by the `model_type` of their configs."""

OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ALBERT": ("albert", "", {}),
    "Swin": ("swin", "", {}),
    "ConvNeXt": ("convnext", "", {}),
    "SAM": ("sam", "", {}),
    "DETR": ("detr", "", {}),
    "DeepSeek-V3": ("deepseek_v3", "", {}),
    "LLaVA": ("llava", "", {}),
    "BART, the decoder alone": ("bart", "BartForCausalLM", {}),
    "DINOv2, as a backbone": ("dinov2", "Dinov2Backbone", {}),
    "BEiT, semantic segmentation": ("beit", "BeitForSemanticSegmentation", {}),
    "DeBERTa-v2 with a convolution behind its first layer": (
        "deberta-v2",
        "",
        {"conv_kernel_size": 3, "conv_act": "gelu"},
    ),
}
"""Models that are not fused, or have no table of their own: row of the tests, class and changed fields."""


def rows_of(model_type: str) -> list[str]:
    """Rows of a `model_type`."""
    return [name for name in (*families.TINY, *families.FAMILIES) if families.model_type_of(name) == model_type]


def names() -> list[str]:
    """Every `model_type` with a table of attention and MLP blocks, in the order of `BUILTIN`."""
    return [each.model_type for each in BUILTIN if rows_of(each.model_type)]


def stack_of(row: str) -> str | None:
    return families.FAMILIES[row].stack or None if row in families.FAMILIES else None


def sentence(error: Exception) -> str:
    """The first sentence of a message, without the list of what is known."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


def answer(run: Callable[[], Any]) -> tuple[str, Any]:
    """ "works", "refused: reason" or "fails: error", and the result."""
    try:
        return WORKS, run()
    except LayerFuseError as error:
        return f"refused: {sentence(error)}", None
    except Exception as error:  # the page shows it
        return f"fails: {type(error).__name__}: {sentence(error)}", None


def head_answer(row: str, head: str) -> str:
    """Whether one head keeps the contract and can lose layers, saved and reloaded with the same outputs."""

    def run() -> None:
        model = families.family_model(row, head)
        inputs, table = families.family_inputs(row, model, 4, seed=1), families.family_table(row, model)
        check_contract(model, [inputs], table)
        plan = table.plan(6, (Fuse("layer", (1, 2), operator="freeze"), Drop("layer", 4)))
        verify(apply(model, plan), inputs=inputs)

    return answer(run)[0]


def searched(row: str) -> dict[str, Any]:
    """Answers of every search on one row, and the calibration losses around the refit of "depth"."""
    model = families.family_model(row)
    batches, found = families.family_batches(row, model, 4), {}
    for name, asked in SEARCHES.items():
        shared = {"batches": batches, "stack": stack_of(row), **asked}
        if name == "collapse":
            found[name], small = answer(lambda: collapse(model, **shared))  # noqa: B023
        else:
            found[name], small = answer(lambda: fuse(model, effort="low", **shared))  # noqa: B023
        if name == "depth" and small is not None:
            refit = small.fusion_report.plan.notes.refit
            report = verify(small, inputs=batches[0])
            found.update(before=refit.before, after=refit.after, cache=report.get("cache"))
    return found


def lines_of(model_type: str) -> int:
    """Lines of the table in the source, with those of its variants and stacks, without the lines that it inherits."""
    tables = [families.family_table(row, families.family_model(row)) for row in rows_of(model_type)]
    kinds = {type(ARCHITECTURES[model_type]), *map(type, tables)}
    return sum(bool(line.strip()) for kind in kinds for line in inspect.getsource(kind).splitlines())


def extends(model_type: str) -> str | None:
    """The architecture whose table this one changes."""
    bases = type(ARCHITECTURES[model_type]).__mro__[1:]
    return next((base.model_type for base in bases if base in BUILTIN), None)


def measured(model_type: str) -> dict[str, Any]:
    """The row of a family: its heads, its cells by variant, and its table."""
    table, heads = ARCHITECTURES[model_type], dict[str, dict[str, str]]()
    for row in rows_of(model_type):
        for head in families.heads_of(model_type):
            answers, stack = heads.setdefault(head.__name__, {}), stack_of(row) or ""
            if not families.takes_states(row, head.__name__):
                continue
            if answers.get(stack, WORKS) == WORKS:  # the first variant that is refused stays
                answers[stack] = head_answer(row, head.__name__)
    return {
        "heads": heads,
        "variants": {row: searched(row) for row in rows_of(model_type)},
        "generates": any(families.family_model(row).can_generate() for row in rows_of(model_type)),
        "lines": lines_of(model_type),
        "extends": extends(model_type),
        "stacks": [table.stack for table in (table, *table.other_stacks) if table.stack],
    }


def other(name: str) -> str:
    """What `fuse` answers on a model of `OTHERS`."""
    row, head, changes = OTHERS[name]
    model = families.family_model(row, head, **changes)

    def run() -> PreTrainedModel:
        return fuse(model, keep_layers=3, batches=[families.family_inputs(row, model)] * 4, effort="low")

    return answer(run)[0]


def refusal(answers: dict[str, str]) -> str | None:
    """Why a head is refused: None if one of its stacks works, the answer for the default stack otherwise."""
    return None if WORKS in answers.values() else next(iter(answers.values()))


def cell(row: dict[str, Any], name: str) -> str:
    """One cell of all variants: "works", or the reason with the variant that it is of."""
    found = {variant: answers[name] for variant, answers in row["variants"].items()}
    refused = {variant: each for variant, each in found.items() if each != WORKS}
    if not refused:
        return WORKS
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return "; ".join(f"{variant}: {each}" for variant, each in refused.items())


def refit_cell(row: dict[str, Any]) -> str:
    """Whether the refit lowers the calibration loss, and by how much at least."""
    pairs = [(each["before"], each["after"]) for each in row["variants"].values() if "before" in each]
    if not pairs:
        return "-"
    least = min(1 - after / before for before, after in pairs)
    return f"improves by {least:.0%}" if least >= 0.005 else "equals"


def cache_cell(row: dict[str, Any]) -> str:
    cached = [each["cache"] for each in row["variants"].values() if each.get("cache") is not None]
    return WORKS if cached else "not checked" if row["generates"] else "no decoder"


def table(results: dict[str, Any]) -> list[list[str]]:
    """One row per family."""
    rows = [["family", "such as", "stacks", "heads", *SEARCHES, "refit", "cached generation", "lines of the table"]]
    for name, row in results["families"].items():
        works, tested = sum(not refusal(each) for each in row["heads"].values()), len(row["heads"])
        heads = f"{works}" if works == tested else f"{works} of {tested}"
        lines = f"{row['lines']}" + (f", changes {row['extends']}" if row["extends"] else "")
        cells = [cell(row, search) for search in SEARCHES]
        stacks = ", ".join(row["stacks"]) or "one"
        rows.append([name, EXAMPLES[name], stacks, heads, *cells, refit_cell(row), cache_cell(row), lines])
    return rows


def refusals(results: dict[str, Any]) -> list[list[str]]:
    """One row per model of `OTHERS`, and per head of a family that is refused."""
    rows = [["model", "answer of `fuse`"], *([name, found] for name, found in results["others"].items())]
    for name, row in results["families"].items():
        rows += [[f"{name}, {head}", found] for head, each in row["heads"].items() if (found := refusal(each))]
    return rows


def summary(results: dict[str, Any]) -> str:
    """The counts of the table in one sentence."""
    rows = results["families"].values()
    heads = [each for row in rows for each in row["heads"].values()]
    depth, share, attention, mlp, linear = (sum(cell(row, name) == WORKS for row in rows) for name in SEARCHES)
    fused = sum(not refusal(each) for each in heads)
    return (
        f"{len(rows)} architectures of transformers are tested with all {len(heads)} of their model classes, of which "
        f"{fused} can be fused. Fusing layers in depth works for {depth} architectures, sharing weights for {share}, "
        f"fusing attention blocks for {attention}, fusing MLPs for {mlp}, and linear MLPs for {linear}."
    )


def rows_to_measure(chosen: list[str]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Section, name and measurement of each row; all of them by default."""
    for name in names():
        if not chosen or name in chosen:
            yield "families", name, lambda name=name: measured(name)
    for name in OTHERS:
        if not chosen or name in chosen:
            yield "others", name, lambda name=name: other(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[*names(), *OTHERS, []], help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    options = parsed(parser)
    quiet()
    results = load(PATH) or {"families": {}, "others": {}}
    for section, name, measure in rows_to_measure(options.rows):
        results[section][name] = measure()
        print(name, results[section][name], flush=True)
        kept = {key: results["families"][key] for key in names() if key in results["families"]}
        others = {key: results["others"][key] for key in OTHERS if key in results["others"]}
        results = {"families": kept, "others": others}
        save(results, PATH)
    print(summary(results))


def quiet() -> None:
    """Hide notices on random models, such as that the result is worse than chance."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
