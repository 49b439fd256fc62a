"""What the pages link to outside of this folder is a part of the site, so that a link is the same in a checkout."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("CONTRIBUTING.md", "notebooks/*.ipynb", "recipes/**/*.yaml", "benchmarks/*.py", "benchmarks/results/*.png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add files of the checkout, under the paths that they have there."""
    for path in (path for pattern in LINKED for path in sorted(ROOT.glob(pattern))):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """A link that leaves this folder stays in the site, where those files are."""
    return markdown.replace("](../", "](")
