"""What a step computes at least, by the model's dimensions: model FLOPs, and how much of the GPUs' peak they are.

Counted are the matrix products that the method asks for, two operations for each multiply-add, as in PaLM (arXiv
2204.02311, appendix B), whose count of attention is halved here since it is causal:

- A token costs ``2 N`` in a forward pass, ``N`` being the weights of the layers' linear maps that it goes through (of
  experts: the router and those chosen), and a sequence of ``s`` tokens ``2 s^2 d`` in each layer's attention, ``d``
  being the width of all query heads.
- A row (a token that carries loss) costs ``2 H V`` in the head. Prompts have no rows.
- The student's forward and backward pass is three times its forward pass: gradients by inputs and by weights. With
  adapters the weights are frozen and have no gradient: twice, but for attention, which has no weights.
- The teacher's is one forward pass.

Not counted are recomputation (of ``model.recompute`` and of the loss, which computes logits again), padding, adapters,
norms, the optimizer, the old log-probs of several updates a step, sampling and evaluation. This is the work that has to
be done, so what a run does beyond it lowers its figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.types import AlignedSample

# Dense bfloat16 with float32 accumulation, 10^12 operations a second, by NVIDIA's data sheets; the first name that a
# device's begins with counts.
_PEAKS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA GH200": 989.4,
    "NVIDIA B200": 2250.0,
}


def known_peak(device: str) -> float | None:
    """The bfloat16 peak of a GPU by its name, in 10^12 operations a second; ``None`` for one that is not listed."""
    return next((peak for name, peak in _PEAKS.items() if device.startswith(name)), None)


@dataclass(frozen=True)
class StepFlops:
    """The model FLOPs of this run's steps.

    Attributes:
        student: The student's dimensions.
        teacher: The teacher's.
        adapters: Whether adapters train and the student's weights are frozen.
        world_size: GPUs, or processes without any.
        peak_tflops: What one of them can do at most, in 10^12 operations a second, where that is known.
    """

    student: Qwen3Spec
    teacher: Qwen3Spec
    adapters: bool
    world_size: int
    peak_tflops: float | None

    def of(self, samples: Sequence[AlignedSample]) -> float:
        """Model FLOPs of one pass over ``samples``, on all GPUs together."""
        rows = sum(len(sample.response_ids) for sample in samples)
        linear, attention = _forward(self.student, [sample.student_tokens for sample in samples], rows)
        total = (2 if self.adapters else 3) * linear + 3 * attention
        taught = [sample for sample in samples if sample.teacher_tokens]
        rows = sum(len(sample.response_ids) for sample in taught)
        return total + sum(_forward(self.teacher, [sample.teacher_tokens for sample in taught], rows))

    def report(self, samples: Sequence[AlignedSample], seconds: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a step: its FLOPs by the seconds of the phases that they are spent in."""
        spent = sum(seconds.get(phase, 0.0) for phase in ("teacher", "student", "optimizer"))
        if not samples or not spent:
            return {}
        tflops = self.of(samples) / spent / self.world_size / 1e12
        report = {"model_tflops_per_gpu": tflops}
        if self.peak_tflops is not None:
            report["mfu"] = tflops / self.peak_tflops
        return report


def _forward(spec: Qwen3Spec, lengths: Iterable[int], rows: int) -> tuple[float, float]:
    """Operations of a forward pass over sequences: linear maps with the head, and attention."""
    lengths = list(lengths)
    width = spec.num_heads * spec.head_dim
    weights = 0
    for layer in range(spec.num_layers):
        weights += spec.hidden_size * (2 * width + 2 * spec.num_kv_heads * spec.head_dim)
        chosen, ffn = spec.experts_used(layer)
        weights += 3 * spec.hidden_size * (chosen * ffn or spec.ffn_size) + spec.hidden_size * spec.experts_in(layer)
    linear = 2.0 * weights * sum(lengths) + 2.0 * spec.hidden_size * spec.vocab_size * rows
    return linear, 2.0 * spec.num_layers * width * sum(length * length for length in lengths)
