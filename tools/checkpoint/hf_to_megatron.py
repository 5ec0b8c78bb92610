"""Convert a Hugging Face Qwen3 directory to a Megatron checkpoint that loads at any mesh.

    python tools/checkpoint/hf_to_megatron.py --hf HF_DIR --output DIR [--dtype bfloat16]

The checkpoint carries the configuration and tokenizer along. Start a run from it with ``model.checkpoint=DIR``. Tensors
are converted one after the other: memory does not grow with the model.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

from opsd_megatron.errors import EXIT_BAD_INPUT, OpsdError


def main() -> int:
    """Run the tool; the exit status is 0, or 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="HF_DIR", help="Hugging Face directory or Hub name")
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoint to make; must not exist")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="cast the weights; default: keep theirs")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a conversion needs no device; set before torch looks for one
    warnings.filterwarnings("ignore", module="megatron")  # it names every optional library that is not installed
    import torch

    from opsd_megatron.checkpoint.convert import hf_to_megatron
    from opsd_megatron.models.families import resolve_model_path

    dtype = getattr(torch, options.dtype) if options.dtype else None
    try:
        hf_to_megatron(resolve_model_path(options.hf, option="--hf"), options.output, dtype=dtype)
    except OpsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
