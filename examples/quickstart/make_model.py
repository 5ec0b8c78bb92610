"""Makes the quickstart's model: ``python make_model.py --data DIR --output HF_DIR``.

The directory is what one would download for any Qwen3, only small: the real architecture (q/k norms, grouped-query
attention, tied embeddings) with 0.6M random float32 parameters, and a byte-level BPE tokenizer of 384 tokens trained on
the quickstart's own texts, with Qwen3's special tokens and a chat template that follows its ``enable_thinking``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opsd_megatron.checkpoint.atomic import atomic_directory
from opsd_megatron.errors import EXIT_BAD_INPUT, CheckpointError

PROMPTS = Path(__file__).parent / "prompts"
VOCABULARY = 384
MAX_LENGTH = 512
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Words with the space before them, single digits, runs of punctuation, white space. Digits stand alone as in Qwen3, so
# that a sum is spelled digit by digit.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"

# As in Qwen3, thinking mode leaves the opening <think> to the model; without it, an empty thought is filled in.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of ``VOCABULARY`` tokens on ``texts``; any text still round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The thinking marks are ordinary tokens, as in Qwen3: decoding keeps them.
    added = [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    added += [AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def training_texts(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """What the tokenizer is trained on: both roles' conversations."""
    templates = {role: (PROMPTS / f"{role}.txt").read_text(encoding="utf-8") for role in ("student", "teacher")}
    for row in rows:
        prompt = templates[row["role"]].replace("{problem}", row["problem"]).replace("{reference}", row["solution"])
        yield f"user\n{prompt}\nassistant\n{row['response']}"


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.6M parameters with random float32 weights, equal for equal seeds."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        initializer_range=0.04,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def main() -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description="Write the quickstart's tiny Qwen3 as a Hugging Face directory.")
    parser.add_argument("--data", type=Path, required=True, help="directory that make_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="directory to create; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with (arguments.data / "warm_start.jsonl").open(encoding="utf-8") as file:
        tokenizer = make_tokenizer(training_texts(json.loads(line) for line in file))
    model = make_model(tokenizer, arguments.seed)
    try:
        with atomic_directory(arguments.output) as directory:
            tokenizer.save_pretrained(directory)
            model.save_pretrained(directory)
    except CheckpointError as error:
        print(f"make_model.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"Qwen3 with {model.num_parameters():,} parameters and {len(tokenizer)} tokens in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
