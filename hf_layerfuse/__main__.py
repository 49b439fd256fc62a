"""`python -m hf_layerfuse` is `hf-layerfuse`. With a recipe in place of a command, it is `fuse.py`.

`accelerate launch -m hf_layerfuse RECIPE ...` serves installations without `fuse.py`.
"""

import sys

from .cli import main, run

if __name__ == "__main__":
    first = next(iter(sys.argv[1:]), "-")
    sys.exit(run() if first.startswith("-") or first.endswith((".yaml", ".yml")) else main())
