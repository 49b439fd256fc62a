"""The command `hf-layerfuse`: looks at models and runs, and changes none."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import shtab
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from .cli import parse_overrides
from .errors import CheckpointError, DataError, LayerFuseError
from .evaluation.batches import Batches
from .math.similarity import ON_ACTIVATIONS, ON_WEIGHTS
from .methods.fusion.planner import plan_evenly, plan_fusion
from .models.loading import load_checkpoint
from .models.modeling import head_class
from .models.surgery.size import planned_size
from .pipeline.inspect import Rows, overview
from .pipeline.report.page import write_page
from .pipeline.report.tables import change_table, text_table
from .recipe import FusionRecipe, add_fields

_EXAMPLES = """examples:
  hf-layerfuse inspect openai-community/gpt2
  hf-layerfuse inspect path/to/config.json                          sizes alone, from a config
  hf-layerfuse inspect path/to/bert --similarity cka --text lines.txt
  hf-layerfuse plan openai-community/gpt2 --keep_layers 8
  hf-layerfuse plan path/to/config.json --ratio 0.5 --mode share
  hf-layerfuse report outputs/demo                                  of what fuse.py wrote there
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns 0, or 1 after an error that the user can mend, which goes to standard error."""
    parser = argparse.ArgumentParser(prog="hf-layerfuse", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="the layers of a model, their sizes and how alike they are",
        description="Show what a model is made of, how alike its layers are, and what can be done with it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = inspect.add_argument("model", help="checkpoint or Hub name; or a config: config.json, or its directory")
    inspect.add_argument(
        "--similarity",
        choices=[*ON_WEIGHTS, *ON_ACTIVATIONS],
        help="distance of each layer to the next; default: cosine, of weights. 0 is equal, and independent random "
        f"weights are about 1 apart. {', '.join(ON_ACTIVATIONS)} compare what layers compute, and need --text",
    )
    text = inspect.add_argument("--text", type=Path, metavar="FILE", help="lines of text to compare activations on")
    model.complete = text.complete = shtab.FILE
    plan = commands.add_parser(
        "plan",
        usage="hf-layerfuse plan MODEL [--text FILE] --keep_layers N [--field VALUE ...]",
        help="which layers a fusion would make one, and how large the result would be",
        description="Show what a fusion would do, and do nothing. What is chosen by measuring (a latency budget, "
        "collapse, merge) is planned by fuse.py alone.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = plan.add_argument("model", help="as for inspect; of a config alone, runs of even length become one")
    text = plan.add_argument("--text", type=Path, metavar="FILE", help="lines of text, for a similarity of activations")
    model.complete = text.complete = shtab.FILE
    report = commands.add_parser(
        "report",
        help="a page about what fuse.py has done",
        description="Write one HTML file with the figures, pictures, plan and recipe of a run, which needs nothing "
        "beside it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("output_dir", help="what fuse.py wrote").complete = shtab.DIRECTORY
    report.add_argument("--output", metavar="FILE", help="where to; default: report.html in output_dir")
    add_fields(plan, "what it is to be (fields of FusionRecipe)", FusionRecipe)
    shtab.add_argument_to(parser, "--print-completion", help="print what completes this command in a shell")
    known, rest = parser.parse_known_args(arguments)
    try:
        if rest and known.command != "plan":  # whose recipe says what is wrong with them
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if known.command == "report":
            print(f"Written: {write_page(known.output_dir, known.output)}")
            return 0
        if known.command == "plan":
            names = vars(known).keys() & {field.name for field in fields(FusionRecipe)}
            given = [f"--{name}={getattr(known, name)}" for name in names]
            tables = _plan(known, FusionRecipe(**parse_overrides([*given, *rest])))
        else:
            tables = _inspect(known)
    except LayerFuseError as error:
        print(f"hf-layerfuse: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(map(text_table, tables)))
    return 0


def _inspect(known: argparse.Namespace) -> list[Rows]:
    model, similarity = _load(known.model), known.similarity
    if model.device.type != "meta":
        similarity = similarity or "cosine"
    elif similarity is not None:
        raise CheckpointError(
            f"{known.model!r} is a config without weights, of which nothing is alike: leave --similarity out, or "
            "name a checkpoint."
        )
    return overview(model, similarity, _batches(known, similarity))


def _plan(known: argparse.Namespace, recipe: FusionRecipe) -> list[Rows]:
    model = _load(known.model)
    if model.device.type == "meta":
        plan = plan_evenly(model, recipe)
    else:
        plan = plan_fusion(model, recipe, _batches(known, recipe.similarity))
    sizes = [planned_size(model, replace(plan, edits=edits)) for edits in ((), plan.edits)]
    return [
        change_table(plan),
        [
            ["", "before", "after"],
            ["parameters", *(f"{size['parameters']:,}" for size in sizes)],
            ["megabytes", *(f"{size['bytes'] / 1e6:,.1f}" for size in sizes)],
        ],
    ]


def _load(name: str) -> PreTrainedModel:
    """A checkpoint; or a model without weights, where there is a config alone."""
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    weights = any(any(folder.glob(f"*.{ending}")) for ending in ("safetensors", "bin", "h5", "msgpack"))
    if path.exists() and (path.is_file() or not weights):
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name!r} holds neither a checkpoint nor a config: {error}") from error
        with torch.device("meta"):
            return head_class(config)(config)
    return load_checkpoint(name)


def _batches(known: argparse.Namespace, similarity: str | None) -> Batches | None:
    """Lines of a file as batches of 16, cut after 128 tokens; 256 lines at most."""
    text: Path | None = known.text
    if text is None:
        if similarity in ON_ACTIVATIONS:
            raise DataError(f"--similarity {similarity} compares what layers compute from a text: give --text FILE.")
        return None
    try:
        lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()][:256]
        tokenizer = AutoTokenizer.from_pretrained(known.model)
    except (OSError, ValueError) as error:
        raise DataError(f"--text {text}: {error}") from error
    if not lines:
        raise DataError(f"--text {text} has no lines of text: name a file with some.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the attention mask hides it
    parts = [lines[start : start + 16] for start in range(0, len(lines), 16)]
    return [dict(tokenizer(p, truncation=True, max_length=128, padding=True, return_tensors="pt")) for p in parts]
