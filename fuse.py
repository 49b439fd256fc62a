"""accelerate launch fuse.py recipes/gpt2-wikitext2.yaml [--model PATH] [--output_dir DIR] [--section.field value]"""

import sys

from hf_layerfuse.cli import run

if __name__ == "__main__":
    sys.exit(run())
