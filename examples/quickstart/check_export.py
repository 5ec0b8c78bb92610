"""Loads a Hugging Face directory in transformers and in vLLM and compares their greedy answers, token by token.

``python check_export.py --model HF_DIR --eval eval.jsonl --output REPORT.json``. Both compute in float32, so they must
agree. Where two tokens are equally likely up to rounding, the order of a sum decides between them: such a tie is
reported and accepted, anything else fails with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from opsd_megatron.telemetry.files import write_atomically

MAX_NEW_TOKENS = 64
TIE = 1e-4  # gap of two logits, far above float32 rounding here (about 1e-6) and far below any preference


@dataclass(frozen=True)
class Disagreement:
    """The first token at which two answers to one prompt part.

    Attributes:
        prompt: Index of the prompt.
        position: Index of the token in the response.
        transformers_token: What transformers chose.
        vllm_token: What vLLM chose; -1 where its answer ended.
        gap: How much higher transformers' logit of its own choice is.
    """

    prompt: int
    position: int
    transformers_token: int
    vllm_token: int
    gap: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone explains it."""
        return self.gap < TIE


def student_prompts(model: Path, problems: Path, template: Path, count: int) -> list[list[int]]:
    """Token ids of the first ``count`` problems as the student sees them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    user_message = template.read_text(encoding="utf-8").strip()
    with problems.open(encoding="utf-8") as file:
        statements = [json.loads(line)["problem"] for line in file][:count]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": user_message.replace("{problem}", statement)}],
            add_generation_prompt=True,
            enable_thinking=True,
            return_dict=False,
        )
        for statement in statements
    ]


@torch.no_grad()
def answers_by_transformers(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy responses, one prompt at a time (no padding)."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, max_new_tokens=MAX_NEW_TOKENS
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def answers_by_vllm(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy responses of an engine that is started for this."""
    # vLLM reads these as it is imported: one process, a small cache, no compilation for a few prompts.
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="ERROR",
        TORCH_COMPILE_DISABLE="1",
    )
    logging.getLogger("vllm").setLevel(logging.ERROR)  # it logs as it is imported, before it reads its own setting
    warnings.simplefilter("ignore", FutureWarning)  # it touches every name torch has deprecated
    from vllm import LLM, SamplingParams

    engine = LLM(str(model), dtype="float32", max_model_len=512, enforce_eager=True, seed=0, use_tqdm_on_load=False)
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.no_grad()
def first_disagreement(
    model: PreTrainedModel, index: int, prompt: list[int], ours: list[int], theirs: list[int]
) -> Disagreement | None:
    """Where two responses to ``prompt`` part, or ``None`` where they are equal."""
    if ours == theirs:
        return None
    position = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    mine = ours[position] if position < len(ours) else -1
    other = theirs[position] if position < len(theirs) else -1
    if -1 in (mine, other):  # equal up to the end of one of them: no choice of tokens explains that
        return Disagreement(index, position, mine, other, gap=float("inf"))
    logits = model(torch.tensor([prompt + ours[:position]])).logits[0, -1]
    return Disagreement(index, position, mine, other, gap=float(logits[mine] - logits[other]))


def main() -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description="Compare greedy answers of transformers and vLLM.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--eval", type=Path, required=True, help="JSONL file with a column problem")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--template", type=Path, default=Path(__file__).parent / "prompts" / "student.txt")
    parser.add_argument("--prompts", type=int, default=48, help="how many problems to compare")
    arguments = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    prompts = student_prompts(arguments.model, arguments.eval, arguments.template, arguments.prompts)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ours = answers_by_transformers(model, prompts)
    theirs = answers_by_vllm(arguments.model, prompts)

    pairs = enumerate(zip(prompts, ours, theirs, strict=True))
    found = [first_disagreement(model, i, prompt, a, b) for i, (prompt, a, b) in pairs]
    disagreements = [entry for entry in found if entry is not None]
    failures = [entry for entry in disagreements if not entry.is_tie]
    equal = len(prompts) - len(disagreements)
    print(f"{equal} of {len(prompts)} greedy answers are equal in transformers and vLLM, token by token")
    for entry in disagreements:
        kind = "a tie in float32" if entry.is_tie else "DIFFERENT"
        print(f"  prompt {entry.prompt}, token {entry.position}: logits {entry.gap:.1e} apart, {kind}")
    report = {"prompts": len(prompts), "equal": equal, "disagreements": [asdict(entry) for entry in disagreements]}
    if not failures:
        write_atomically(arguments.output, [json.dumps(report, indent=2) + "\n"])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
