"""Add the linked files outside docs/ to the site, so that links work there as in a checkout."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("CONTRIBUTING.md", "notebooks/*.ipynb", "recipes/**/*.yaml", "benchmarks/*.py", "benchmarks/results/*.png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add linked files of the checkout under their own paths."""
    for path in (path for pattern in LINKED for path in sorted(ROOT.glob(pattern))):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links that leave docs/ to the same files in the site."""
    return markdown.replace("](../", "](")
