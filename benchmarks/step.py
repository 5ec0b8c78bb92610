"""Whole OPSD steps: ``python benchmarks/step.py --work DIR [--peer PYTHON] [--case SIZE:PROBLEMS:TOKENS[:RANKS] ...]``.

A random Qwen3 of one of two sizes takes steps of the whole method: rollout on vLLM, teacher, student, optimizer, weight
sync, in float32, with the full-vocabulary Jensen-Shannon divergence. ``--peer`` names the interpreter of an environment
that has TRL 1.16; its `SDFTTrainer` then takes the same steps on the same model, prompts, lengths and threads, in turn
with ours. Random models hardly ever end a response, so lengths are what the limit says. A step's seconds are the median
over the steps after the first two; memory is the most that all processes of a run held together (proportional set
size, imports and engine included; see :class:`Peak`). Prints a Markdown table, ours by phase.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples/quickstart"
GIB = 2**30
WARM_UP = 2
PHASES = ("sync", "rollout", "pack", "teacher", "student", "optimizer")
DEFAULT_CASES = ["0.64M:32:36", "103M:8:64", "103M:8:256", "103M:8:1024", "103M:8:256:2"]


@dataclass(frozen=True)
class Case:
    """One size of a step.

    Attributes:
        size: ``0.64M`` (the quickstart's, 384 entries) or ``103M`` (hidden 512, 8 layers, 151,936 entries).
        problems: Problems a step, one rollout each.
        new_tokens: Longest response.
        ranks: Our processes, tensor parallel; the machine's cores are shared out over them.
    """

    size: str
    problems: int
    new_tokens: int
    ranks: int = 1

    @classmethod
    def parse(cls, text: str) -> Case:
        """From ``SIZE:PROBLEMS:NEW_TOKENS[:RANKS]``."""
        size, *numbers = text.split(":")
        if size not in MODELS or len(numbers) not in (2, 3):
            raise argparse.ArgumentTypeError(f"{text} is not SIZE:PROBLEMS:NEW_TOKENS[:RANKS], SIZE of {list(MODELS)}")
        return cls(size, *map(int, numbers))


@dataclass(frozen=True)
class Outcome:
    """What one run of a case cost; seconds of the median step, by phase where that is known."""

    seconds: float
    phases: dict[str, float]
    peak_bytes: int


def make_small(work: Path) -> Path:
    """The quickstart's data and untrained model, by its own scripts."""
    model = work / "0.64M"
    if not model.exists():
        script = [sys.executable, QUICKSTART / "make_data.py", "--output", work / "data"]
        subprocess.run(script, check=True, env=environment(2))
        script = [sys.executable, QUICKSTART / "make_model.py", "--data", work / "data", "--output", model]
        subprocess.run(script, check=True, env=environment(2))
    return model


def make_103m(work: Path) -> Path:
    """A random Qwen3 with Qwen3's vocabulary size and the quickstart's tokenizer, which names the first 384 of it."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    model = work / "103M"
    if not model.exists():
        tokenizer = AutoTokenizer.from_pretrained(make_small(work))
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=151_936,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
        Qwen3ForCausalLM(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
    return model


MODELS = {"0.64M": make_small, "103M": make_103m}


def environment(threads: int) -> dict[str, str]:
    """This process's environment with so many threads a process."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def ours(case: Case, work: Path, steps: int, settings: Sequence[str] = ()) -> Outcome:
    """Steps of this package, with further ``settings``, each ``KEY=VALUE``."""
    model = MODELS[case.size](work)
    output = work / f"run_{time.time_ns()}"
    # The peer's prompts: the problem alone, and the problem with the reference after it.
    (work / "student.txt").write_text("{problem}")
    (work / "teacher.txt").write_text("{problem}\n\n{reference}")
    overrides = {
        "model.path": model,
        "model.dtype": "float32",
        "data.train": work / "data/train.jsonl",
        "data.student_template": work / "student.txt",
        "data.teacher_template": work / "teacher.txt",
        "objective.beta": 0.5,
        "objective.clip": "null",
        "parallel.tensor": case.ranks,
        "parallel.sequence": str(case.ranks > 1).lower(),
        "rollout.max_new_tokens": case.new_tokens,
        "rollout.save": "false",
        "model.max_length": case.new_tokens + 256,
        "train.problems_per_step": case.problems,
        "train.steps": steps,
        "optimizer.lr": 1e-5,
        "checkpoint.at_end": "false",
        "output_dir": output,
    }
    command = [sys.executable]
    if case.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    command += ["-m", "opsd_megatron.train", *(f"{key}={value}" for key, value in overrides.items()), *settings]
    _, peak = run(command, environment(max(1, (os.cpu_count() or 1) // case.ranks)))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    phases = {phase: statistics.median(line["seconds"].get(phase, 0.0) for line in lines) for phase in PHASES}
    return Outcome(statistics.median(line["step_seconds"] for line in lines), phases, peak)


def peer(case: Case, work: Path, steps: int, python: Path) -> Outcome:
    """Steps of TRL."""
    model = MODELS[case.size](work)
    command = [python, ROOT / "benchmarks/peers/trl_step.py", "--model", model, "--data", work / "data/train.jsonl"]
    command += ["--problems", case.problems, "--new-tokens", case.new_tokens, "--steps", steps]
    printed, peak = run(list(map(str, command)), environment(os.cpu_count() or 1))
    seconds = json.loads(printed.strip().splitlines()[-1])["seconds"]
    return Outcome(statistics.median(seconds[WARM_UP:]), {}, peak)


def run(command: list[str], variables: dict[str, str]) -> tuple[str, int]:
    """What a command prints, and the most memory that it and its children held together, in bytes."""
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, done = Peak(), threading.Event()

    def sample() -> None:
        while not done.wait(0.2):
            peak.look([process.pid, *descendants(process.pid)])

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        printed, errors = process.communicate()
    finally:
        done.set()
        sampler.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}:\n{errors[-4000:]}")
    return printed, peak.bytes


class Peak:
    """The most proportional set size of processes, looked at again and again.

    To find it the kernel visits every page, which holds a process up. So it is asked only near the most pages so far,
    whose number costs nothing, and there every other second unless they are more than ever.

    Attributes:
        bytes: The most so far.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._pids: list[int] = []
        self._most_pages = 0
        self._asked = 0.0

    def look(self, pids: list[int]) -> None:
        """Count the pages of these processes, shared ones in full, and ask for more where that may be the peak."""
        if pids != self._pids:  # what another set of processes shares says nothing of these
            self._pids, self._most_pages = pids, 0
        pages = sum(map(resident_pages, pids))
        recent = time.monotonic() < self._asked + 2
        if pages > self._most_pages or (pages > 0.98 * self._most_pages and not recent):
            self._most_pages = max(self._most_pages, pages)
            self.bytes = max(self.bytes, sum(map(proportional_set_size, pids)))
            self._asked = time.monotonic()


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in path.read_text().split()]
        except OSError:  # it ended meanwhile
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def resident_pages(pid: int) -> int:
    """Pages of a process in memory, shared ones in full; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0


def proportional_set_size(pid: int) -> int:
    """Memory of a process in bytes, pages it shares counted in part; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def median(outcomes: list[Outcome]) -> Outcome:
    """The median of every figure."""
    phases = {key: statistics.median(o.phases[key] for o in outcomes) for key in outcomes[0].phases}
    seconds, peak = (statistics.median(getattr(o, name) for o in outcomes) for name in ("seconds", "peak_bytes"))
    return Outcome(seconds, phases, int(peak))


def row(case: Case, mine: Outcome, other: Outcome | None) -> str:
    """A line of the table."""
    cells = [case.size, f"{case.problems} x {case.new_tokens}", str(case.ranks), f"{mine.seconds:.2f}"]
    cells += [f"{mine.phases[phase]:.2f}" for phase in PHASES]
    cells += [f"{case.problems * case.new_tokens / mine.seconds:.0f}", f"{mine.peak_bytes / GIB:.2f}"]
    if other is None:
        cells += ["-", "-", "", ""]
    else:
        cells += [f"{other.seconds:.2f}", f"{other.peak_bytes / GIB:.2f}", f"{other.seconds / mine.seconds:.1f}"]
        cells.append(f"{mine.peak_bytes / other.peak_bytes:.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for data, models and runs")
    parser.add_argument("--peer", type=Path, help="python of an environment with trl")
    parser.add_argument("--case", type=Case.parse, nargs="+", default=[Case.parse(text) for text in DEFAULT_CASES])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of our runs")
    parser.add_argument("--steps", type=int, default=6, help=f"the first {WARM_UP} are left out")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} that are left out")
    options.work.mkdir(parents=True, exist_ok=True)
    settings = [f"{os.cpu_count()} cores", f"{options.steps} steps", f"{options.repeats} runs", *options.set]
    print(f"{time.strftime('%Y-%m-%d')}, {', '.join(settings)}\n")
    head = ["model", "problems x tokens", "ranks", "s a step", *PHASES, "response tokens/s", "GiB"]
    head += ["TRL: s a step", "TRL: GiB", "times as fast", "memory"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head), flush=True)
    for case in options.case:
        mine, other = [], []
        for _ in range(options.repeats):
            mine.append(ours(case, options.work, options.steps, options.set))
            if options.peer is not None and case.ranks == 1:
                other.append(peer(case, options.work, options.steps, options.peer))
        print(row(case, median(mine), median(other) if other else None), flush=True)


if __name__ == "__main__":
    main()
