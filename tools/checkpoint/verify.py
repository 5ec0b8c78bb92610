"""Check that a Megatron checkpoint and a Hugging Face directory hold the same model.

    python tools/checkpoint/verify.py --hf HF_DIR --checkpoint DIR

Compares every tensor bit for bit, one after the other, then the logits of transformers and of this package's model on
sample text, both in float32. Where the checkpoint was converted to another type, the directory's tensors are rounded to
it first, for both comparisons. Logits agree where they differ by at most 3e-5 of the largest of them. Prints a table;
the exit status is 0 where all agrees, 1 where something differs and 2 for bad input. The logits need the model in
memory, in float32; ``--tensors-only`` leaves them out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from opsd_megatron.errors import EXIT_BAD_INPUT, OpsdError

if TYPE_CHECKING:
    import torch

# Largest difference of float32 logits that rounding explains, as a share of the largest logit: the two sum in different
# orders. 28 layers of H 512 come to 3e-6.
LOGIT_BOUND = 3e-5
# transformers 5 keeps a layer's experts in one parameter, of which gate and up are one as well.
FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")
SAMPLE_TEXTS = (
    "Find all integers n for which n^2 + 3n + 5 is divisible by 121. Suppose 121 divides it; then 11 does, too.",
    "The quick brown fox jumps over the lazy dog.",
    "42",
)
SHOWN = 10


def sample_ids(hf: str) -> list[list[int]]:
    """The sample texts as token ids; random ids where the directory has no tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from opsd_megatron.models.families import read_spec

    if (Path(hf) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(hf)
        return [tokenizer(text)["input_ids"] for text in SAMPLE_TEXTS]
    vocab_size, generator = read_spec(hf).vocab_size, torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (len(text),), generator=generator).tolist() for text in SAMPLE_TEXTS]


def round_weights(reference: torch.nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Round a float32 model's weights to what a checkpoint keeps them in, ``dtypes`` by Hugging Face name."""
    # A directory may call a model untied whose head is the embedding all the same.
    dtypes = {"lm_head.weight": dtypes["model.embed_tokens.weight"], **dtypes}
    for name, parameter in reference.named_parameters():
        of_one = FUSED_EXPERTS.sub(lambda match: f".experts.0.{match[1].removesuffix('_up')}_proj.weight", name)
        parameter.data = parameter.data.to(dtypes[of_one]).float()


def logit_difference(hf: str, checkpoint: str, samples: list[list[int]]) -> tuple[float, float]:
    """Largest absolute difference of the two models' logits on ``samples``, and the largest of the directory's."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from opsd_megatron.checkpoint.compare import checkpoint_logits, stored_dtypes

    logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    round_weights(reference, stored_dtypes(checkpoint))
    with torch.no_grad():
        expected = [reference(torch.tensor([sample])).logits[0] for sample in samples]
    del reference
    logits = checkpoint_logits(checkpoint, samples)
    largest = max(float((ours - theirs).abs().max()) for ours, theirs in zip(logits, expected, strict=True))
    return largest, max(float(theirs.abs().max()) for theirs in expected)


def verify(hf: str, checkpoint: str, *, logits: bool = True) -> bool:
    """Compare and print the table; True where the two agree."""
    from opsd_megatron.checkpoint.compare import compare_tensors
    from opsd_megatron.models.families import read_spec, resolve_model_path

    hf = str(resolve_model_path(hf, option="--hf"))
    read_spec(hf)  # a configuration that cannot be read is bad input, not a difference
    count, differences = compare_tensors(hf, checkpoint)
    rows = [("tensors, bit for bit", f"{count - len(differences)} of {count} equal", not differences)]
    if logits:
        samples = sample_ids(hf)
        label = f"logits, {sum(map(len, samples))} positions"
        if any(difference.largest is None for difference in differences):
            rows.append((label, "not compared: the models have other tensors", False))
        else:
            difference, largest = logit_difference(hf, checkpoint, samples)
            text = f"largest difference {difference:.2g}, at most {LOGIT_BOUND:g} * {largest:.3g} = "
            rows.append((label, f"{text}{LOGIT_BOUND * largest:.2g}", difference <= LOGIT_BOUND * largest))
    for what, found, agrees in rows:
        print(f"{what:<24} {found:<62} {'ok' if agrees else 'DIFFERENT'}")
    for each in differences[:SHOWN]:
        by = "" if each.largest is None else f" by up to {each.largest:.3g}"
        print(f"  {each.name}: {each.reason}{by}")
    if len(differences) > SHOWN:
        print(f"  and {len(differences) - SHOWN} more")
    if cast := cast_to(hf, checkpoint):
        print(f"the directory's tensors were rounded to the checkpoint's {cast} first")
    return all(agrees for _, _, agrees in rows)


def cast_to(hf: str, checkpoint: str) -> str:
    """The types that the checkpoint keeps tensors in which have another one in the directory; empty for none."""
    from opsd_megatron.checkpoint.compare import stored_dtypes
    from opsd_megatron.checkpoint.hf_io import SafetensorsReader

    reader = SafetensorsReader(hf)
    kept = {
        dtype for name, dtype in stored_dtypes(checkpoint).items() if name in reader and reader.dtype(name) != dtype
    }
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in kept))


def main() -> int:
    """Run the tool; see the module's first lines for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="HF_DIR", help="Hugging Face directory or Hub name")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="step_N directory, or a converted one")
    parser.add_argument("--tensors-only", action="store_true", help="do not compare logits")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # compared on the CPU in float32; set before torch looks for a device
    warnings.filterwarnings("ignore", module="megatron")  # it names every optional library that is not installed
    try:
        return 0 if verify(options.hf, options.checkpoint, logits=not options.tensors_only) else 1
    except OpsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
