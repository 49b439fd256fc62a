"""`accelerate launch -m hf_layerfuse RECIPE ...`, for installations without `fuse.py`."""

import sys

from .cli import run

if __name__ == "__main__":
    sys.exit(run())
