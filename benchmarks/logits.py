"""How fast a head's logits come, whole or in parts: ``python benchmarks/logits.py [--hidden 1024] [--rows 128 ...]``.

The product of hidden states with a head of Qwen3's vocabulary in float32 on CPU, as one product and in parts of the
head's rows, in turn. Prints medians of GFLOP/s. From it come the two numbers in `opsd_megatron/losses/head.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the trainer has it

import torch

VOCAB = 151_936


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 191, 192, 256, 512])
    parser.add_argument("--parts", type=int, nargs="+", default=[VOCAB, 480, 960, 1920, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    head = torch.randn(VOCAB, options.hidden)
    print("| rows | " + " | ".join("whole" if part >= VOCAB else str(part) for part in options.parts) + " |")
    print("|" + " --- |" * (len(options.parts) + 1))
    for rows in options.rows:
        hidden, logits = torch.randn(rows, options.hidden), torch.zeros(rows, VOCAB)
        seconds: dict[int, list[float]] = {part: [] for part in options.parts}
        for _ in range(options.repeats):
            for part, taken in seconds.items():
                started = time.perf_counter()
                for first in range(0, VOCAB, part):
                    torch.mm(hidden, head[first : first + part].t(), out=logits[:, first : first + part])
                taken.append(time.perf_counter() - started)
        rates = [2e-9 * rows * options.hidden * VOCAB / statistics.median(taken) for taken in seconds.values()]
        print(f"| {rows} | " + " | ".join(f"{rate:.0f}" for rate in rates) + " |", flush=True)


if __name__ == "__main__":
    main()
