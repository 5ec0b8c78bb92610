"""On-policy self-distillation from nothing, on two CPU cores: ``python examples/quickstart/run.py``.

Makes a tiny Qwen3 and a maths task, warm-starts the model, lets it distil itself, and shows that the gain comes from
the reference. Every stage is a command that can be run by hand; it is printed before it starts. A second call continues
where the first one ended. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import report
from stages import StageError, StageRunner, cost_table

from opsd_megatron.telemetry.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
# The commands run in ROOT and their paths are relative to it, so that they can be repeated as they are printed.
SCRIPTS = Path("examples", "quickstart")
TO_HUGGING_FACE = Path("tools", "checkpoint", "megatron_to_hf.py")
# Two ranks stand for two devices. One thread each: on a model this small, more only wait for each other.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "opsd_megatron.train")
# torch's C++ side would otherwise report in every rank how it binds memory.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
STAGES = 8


def train(experiment: str, settings: Mapping[str, object]) -> list[str]:
    """The command of a training run."""
    return [*TORCHRUN, f"experiment={experiment}", *(f"{key}={value}" for key, value in settings.items())]


def run_stages(output: Path) -> StageRunner:
    """From no data and no model to a distilled one, checked in two other programs.

    Args:
        output: Directory for everything; a relative one is relative to ``ROOT``.
    """
    data, model, base, distilled = output / "data", output / "model", output / "base", output / "opsd_hf"
    stages = StageRunner(ROOT / output / "stages", cwd=ROOT, environment=ENVIRONMENT, total=STAGES)

    stages.run("data", "Make the task's data", [SCRIPTS / "make_data.py", "--output", data])
    stages.run("model", "Make a tiny Qwen3", [SCRIPTS / "make_model.py", "--data", data, "--output", model])

    warm_start = {
        "model.path": model,
        "data.train": data / "warm_start.jsonl",
        "output_dir": output / "warm_start",
        "checkpoint.resume": "true",
    }
    stages.run(
        "warm_start",
        "Warm-start: cross-entropy on noisy solutions, data parallel over 2 ranks",
        train("quickstart_sft", warm_start),
    )
    stages.run(
        "base",
        "Convert the Megatron checkpoint to Hugging Face format: the base model",
        [TO_HUGGING_FACE, "--checkpoint", output / "warm_start/checkpoints/step_800", "--output", base],
    )

    distil = {
        "model.path": base,
        "data.train": data / "train.jsonl",
        "data.eval": data / "eval.jsonl",
        "checkpoint.resume": "true",
    }
    stages.run(
        "opsd",
        "OPSD: the teacher sees the reference; tensor parallel over 2 ranks, vLLM rollouts",
        train("quickstart_opsd", {**distil, "data.privileged": "reference", "output_dir": output / "opsd"}),
    )
    stages.run(
        "control",
        "Control: the same, but the teacher sees no reference",
        train("quickstart_opsd", {**distil, "data.privileged": "none", "output_dir": output / "control"}),
    )

    stages.run(
        "export",
        "Convert the distilled model",
        [TO_HUGGING_FACE, "--checkpoint", output / "opsd/checkpoints/step_30", "--output", distilled],
    )
    check = ["--model", distilled, "--eval", data / "eval.jsonl", "--output", output / "check.json"]
    stages.run(
        "check",
        "Load the export in transformers and in vLLM and compare greedy answers",
        [SCRIPTS / "check_export.py", *check],
    )
    return stages


def summarise(output: Path, stages: StageRunner) -> bool:
    """Print and save the results; whether OPSD beat both the base model and the control beyond doubt."""
    output = ROOT / output
    opsd, control = report.read_run(output / "opsd"), report.read_run(output / "control")
    passed = report.verdict(opsd, control)
    phases = opsd.seconds_by_phase()
    summary = {
        "accuracy": {"base": asdict(opsd.first), "control": asdict(control.last), "opsd": asdict(opsd.last)},
        "intervals_disjoint": passed,
        "greedy_check": json.loads((output / "check.json").read_text(encoding="utf-8")),
        "opsd_step_seconds": phases,
        "stages": [asdict(record) for record in stages.records],
        "total_seconds": round(sum(record.seconds for record in stages.records), 1),
        "peak_memory_gib": max(record.peak_memory_gib for record in stages.records),
    }
    write_atomically(output / "summary.json", [json.dumps(summary, indent=2) + "\n"])
    report.save_picture(output / "curves.png", opsd, control)

    print("\n" + cost_table(stages.records))
    print("\none OPSD step, median seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in phases.items()))
    print("\n" + report.result_table(opsd, control))
    if passed:
        print("\nOPSD's interval lies above both others: the gain is real, and it takes a reference.")
    else:
        print("\nFAILED: OPSD's interval does not lie above both others.")
    print(f"\ncurves: {output / 'curves.png'}\nfigures: {output / 'summary.json'}\nmodel: {output / 'opsd_hf'}")
    return passed


def fresh_directory(output: Path) -> Path:
    """``output``, or where that exists the first free one of ``output-2``, ``output-3``, ...: nothing is deleted."""
    candidate, number = output, 2
    while candidate.exists():
        candidate, number = output.with_name(f"{output.name}-{number}"), number + 1
    return candidate


def main() -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description="On-policy self-distillation of a tiny Qwen3 on two CPU cores.")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "quickstart", help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="start over in a new directory beside --output")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    if arguments.fresh:
        output = fresh_directory(output)
    if output.is_relative_to(ROOT):
        output = output.relative_to(ROOT)
    print(f"quickstart in {output}", flush=True)
    # As an exception, so that the running stage is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        stages = run_stages(output)
    except StageError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0 if summarise(output, stages) else 1


if __name__ == "__main__":
    sys.exit(main())
