"""The loss against what everyone writes: ``python benchmarks/loss.py [--hidden 1024 ...] [--rows 256 1024 4096 ...]``.

One forward and backward pass of the clipped Jensen-Shannon divergence from hidden states, at Qwen3's vocabulary, on one
rank. Ours leaves the head's gradient where a training run has it, in a `main_grad` that is there already and is set to
zero first. The dense version keeps the logits and lets autograd do the rest. Where `liger-kernel` is installed (it is
no requirement: `pip install --no-deps liger-kernel`) its fused linear JSD runs too, without a clip, which it does not
have: its Triton kernels on CUDA, its chunked torch version on CPU. Runs are interleaved; times are medians and mean
something as ratios within one run only. Memory is the peak above the inputs and the gradients that are handed out. The
machine's own matrix-product rate is measured between the runs, on the products that the loss needs: two of logits and
two of gradients, 8 R H V operations, into memory that is there already. They are timed at as many rows at once as a
chunk of the loss has, and at as many as fit into memory; the faster rate counts. Prints a Markdown table, and draws a
picture: the one in the documentation with ``--output docs/images/loss_cpu.png``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

# As the trainer has it (opsd_megatron.train.exit_status): large tensors on the host get huge pages. torch reads this
# when it first allocates, and so for all that is compared here.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import matplotlib
import torch
from torch import Tensor

from opsd_megatron.losses import linear_divergence
from opsd_megatron.losses.head import row_chunks
from opsd_megatron.losses.shard import VocabShard

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VOCAB = 151_936
BETA, CLIP = 0.5, 0.05
GIB = 2**30
# The dense version holds about this many [R, V] float32 tensors at its peak; sizes that would not fit are left out.
DENSE_TENSORS = 12


@dataclass(frozen=True)
class Inputs:
    """Both sides' hidden states ``[R, H]`` and heads ``[V, H]``; the student's take gradients."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    @staticmethod
    def draw(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Random inputs whose two sides differ a little, as a student and its teacher do."""
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        states, head = normal(rows, hidden), normal(VOCAB, hidden) / math.sqrt(hidden)
        return Inputs(
            states.to(dtype).requires_grad_(),
            head.to(dtype).requires_grad_(),
            (states + 0.3 * normal(rows, hidden)).to(dtype),
            head.to(dtype, copy=True),
        )

    def clear(self) -> None:
        """Drop the gradients of an earlier run."""
        self.student_hidden.grad = self.student_head.grad = None

    @property
    def gradient_bytes(self) -> int:
        """Size of the gradients that a run hands out; a `main_grad` is there before."""
        of_head = 0 if hasattr(self.student_head, "main_grad") else self.student_head.nbytes
        return self.student_hidden.nbytes + of_head


def with_main_grad(inputs: Inputs) -> Inputs:
    """The same inputs whose head has the gradient buffer that Megatron-Core gives it, in float32."""
    head = inputs.student_head.detach().requires_grad_()
    head.main_grad = torch.zeros_like(head, dtype=torch.float32)
    head.unit_upstream = True
    return replace(inputs, student_head=head)


def ours(inputs: Inputs) -> Tensor:
    """This package's loss."""
    inputs.student_head.main_grad.zero_()
    return linear_divergence(
        inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head, beta=BETA, clip=CLIP
    ).sum()


def dense(inputs: Inputs) -> Tensor:
    """The same by its definition, logits and all."""
    s = (inputs.student_hidden @ inputs.student_head.T).float().log_softmax(-1)
    with torch.no_grad():
        t = (inputs.teacher_hidden @ inputs.teacher_head.T).float().log_softmax(-1)
    m = torch.logaddexp(s + math.log(1 - BETA), t + math.log(BETA))
    d = BETA * t.exp() * (t - m) + (1 - BETA) * s.exp() * (s - m)
    return d.clamp(max=CLIP).sum()


def liger_peer(cuda: bool) -> Callable[[Inputs], Tensor] | None:
    """Liger-Kernel's version, summed over rows as ours; ``None`` where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    if cuda:
        from liger_kernel.transformers import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=BETA)
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA)

    def loss(inputs: Inputs) -> Tensor:
        rows = inputs.student_hidden.shape[0]
        labels = torch.zeros(rows, dtype=torch.long, device=inputs.student_hidden.device)  # none is ignored
        sides = inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head
        return fused(*sides, labels) * rows

    return loss


@dataclass(frozen=True)
class Cost:
    """Seconds and peak bytes above inputs and gradients of one forward and backward pass."""

    seconds: float
    extra_bytes: int


class Meter:
    """Measures a pass on one device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def measure(self, loss: Callable[[Inputs], Tensor], inputs: Inputs) -> Cost:
        """One forward and backward pass."""
        inputs.clear()
        before = self._reset()
        started = self._now()
        loss(inputs).backward()
        seconds = self._now() - started
        return Cost(seconds, max(0, self._peak() - before - inputs.gradient_bytes))

    def products(self, inputs: Inputs) -> float:
        """Seconds that the four matrix products alone take, at the better of two numbers of rows at once."""
        rows = inputs.student_hidden.shape[0]
        chunk = row_chunks(rows, VocabShard.of(VOCAB, None, None), None, inputs.student_hidden.device)[0].stop
        # Beside the logits there is the head's gradient; half of what is free leaves room for both.
        fit = _free_bytes(inputs.student_hidden.device) // 2 // (VOCAB * inputs.student_head.itemsize)
        return min(self._products_of(inputs, size) * rows / size for size in {chunk, max(chunk, min(rows, fit))})

    @torch.no_grad()
    def _products_of(self, inputs: Inputs, rows: int) -> float:
        """Seconds of the four products of ``rows`` rows, each at its best of two."""
        states, head = inputs.student_hidden.detach()[:rows], inputs.student_head.detach()
        logits, total, gradient = states @ head.T, torch.zeros_like(head), torch.empty_like(states)
        times = [
            self._best(lambda: torch.mm(states, head.T, out=logits)),
            self._best(lambda: torch.mm(states, head.T, out=logits)),
            self._best(lambda: torch.mm(logits, head, out=gradient)),
            self._best(lambda: total.addmm_(logits.T, states)),
        ]
        return sum(times)

    def _best(self, product: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(2):
            started = self._now()
            product()
            times.append(self._now() - started)
        return min(times)

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _reset(self) -> int:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident set
        return _status("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class Row:
    """The figures of one size; others' are ``None`` where they do not fit or are not there."""

    hidden: int
    rows: int
    ours: Cost
    dense: Cost | None
    liger: Cost | None
    products: float

    @property
    def rate(self) -> float:
        """Share of the machine's own matrix-product rate."""
        return self.products / self.ours.seconds

    def cells(self) -> list[str]:
        """The table's cells."""
        mine = f"{self.ours.seconds:.2f} / {self.ours.extra_bytes / GIB:.2f}"
        return [
            str(self.hidden),
            str(self.rows),
            mine,
            f"{self.rate:.0%}",
            *self._against(self.dense),
            *self._against(self.liger),
        ]

    def _against(self, other: Cost | None) -> list[str]:
        if other is None:
            return ["-", "", ""]
        return [
            f"{other.seconds:.2f} / {other.extra_bytes / GIB:.2f}",
            f"{self.ours.seconds / other.seconds:.2f}",
            f"1/{other.extra_bytes / max(self.ours.extra_bytes, 1):.1f}",
        ]


def run(hidden: int, rows: int, repeats: int, dtype: torch.dtype, device: torch.device) -> Row:
    """Measure one size, all versions in turn."""
    inputs, meter = Inputs.draw(rows, hidden, dtype, device), Meter(device)
    fits = DENSE_TENSORS * rows * VOCAB * 4 < _free_bytes(device)
    versions = {"ours": ours, "dense": dense if fits else None, "liger": liger_peer(device.type == "cuda")}
    costs: dict[str, list[Cost]] = {name: [] for name, version in versions.items() if version is not None}
    given = {name: with_main_grad(inputs) if name == "ours" else inputs for name in costs}
    products: list[float] = []
    for turn in range(repeats + 1):
        measured = {name: meter.measure(versions[name], its) for name, its in given.items()}
        if turn:  # the first turn warms up
            for name, cost in measured.items():
                costs[name].append(cost)
            products.append(meter.products(inputs))
    medians = {name: _median(found) for name, found in costs.items()}
    return Row(hidden, rows, medians["ours"], medians.get("dense"), medians.get("liger"), statistics.median(products))


def _median(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(c.seconds for c in costs), int(statistics.median(c.extra_bytes for c in costs)))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


HEADER = ["H", "R", "ours: s / GiB", "of matmul rate"]
HEADER += ["dense: s / GiB", "time", "memory", "Liger: s / GiB", "time", "memory"]


def table(results: list[Row]) -> str:
    """All figures as a Markdown table."""
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in results)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def picture(results: list[Row], path: Path) -> None:
    """Time and memory of both versions over rows, one line for each hidden size."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for number, hidden in enumerate(sorted({row.hidden for row in results})):
        mine = [row for row in results if row.hidden == hidden]
        both = [row for row in mine if row.dense is not None]
        style = {"color": f"C{number}", "marker": "o"}
        for axis, value in ((axes[0], lambda c: c.seconds), (axes[1], lambda c: c.extra_bytes / GIB)):
            axis.plot([r.rows for r in mine], [value(r.ours) for r in mine], label=f"ours, H {hidden}", **style)
            axis.plot([r.rows for r in both], [value(r.dense) for r in both], "--", label=f"dense, H {hidden}", **style)
    for axis, label in ((axes[0], "seconds, forward and backward"), (axes[1], "GiB above inputs and gradients")):
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
        rows = sorted({row.rows for row in results})
        axis.set_xticks(rows, map(str, rows))
        axis.minorticks_off()
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/loss.png"), help="the picture")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    print(
        f"{time.strftime('%Y-%m-%d')}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end=""
    )
    print(f"V {VOCAB}, beta {BETA}, clip {CLIP}, {options.dtype}, medians of {options.repeats}\n", flush=True)
    results = []
    for hidden in options.hidden:
        for rows in options.rows:
            results.append(run(hidden, rows, options.repeats, getattr(torch, options.dtype), device))
            print("measured H {} R {}".format(*results[-1].cells()), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture(results, options.output)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
