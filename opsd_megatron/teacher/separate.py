"""A teacher that is another model: on-policy distillation from, say, a larger one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_megatron.checkpoint.digest import weights_digest
from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.config import Config
from opsd_megatron.errors import ConfigError, ModelError
from opsd_megatron.models.build import build_model
from opsd_megatron.models.families import read_spec, resolve_model_path
from opsd_megatron.models.qwen3 import Qwen3Spec, check_sizes
from opsd_megatron.models.tokenizer import load_tokenizer
from opsd_megatron.models.weight_map import check_tensors, load_hf_weights
from opsd_megatron.teacher.base import StudentFiles, TeacherParts
from opsd_megatron.teacher.frozen import FrozenTeacher


class SeparateTeacher(FrozenTeacher):
    """The weights of another Hugging Face directory, never changed; its sizes and family may differ, its tokens not.

    Prompts are rendered by the student's tokenizer, responses are the student's tokens: the teacher has to give them
    the same ids, and its chat template has to render a question alike. Rows of its vocabulary beyond the student's,
    which no token uses, are left out.
    """

    @classmethod
    def check(cls, student: StudentFiles) -> dict[str, Any]:
        """See :class:`~opsd_megatron.teacher.base.TeacherPolicy`."""
        path = _path(student.config.teacher.path)
        spec = read_spec(path)
        _check_vocabulary(path, load_tokenizer(path, spec), spec, student)
        check_tensors(spec, SafetensorsReader(path))
        try:
            check_sizes(spec, student.config)
        except ConfigError as error:
            raise ConfigError(f"the teacher, {path}: {error}") from error
        if student.max_length > spec.max_positions:
            raise ConfigError(
                f"the teacher, {path}, has max_position_embeddings={spec.max_positions}, sequences may be "
                f"{student.max_length} tokens long; set model.max_length to at most {spec.max_positions}"
            )
        return {"weights": weights_digest(path), "config": asdict(spec)}

    @classmethod
    def own_spec(cls, config: Config) -> Qwen3Spec:
        """See :class:`~opsd_megatron.teacher.base.TeacherPolicy`."""
        return read_spec(_path(config.teacher.path))

    @classmethod
    def build(cls, parts: TeacherParts) -> Self:
        """See :class:`~opsd_megatron.teacher.base.TeacherPolicy`."""
        path = _path(parts.config.teacher.path)
        spec = replace(read_spec(path), vocab_size=parts.spec.vocab_size)
        model = build_model(spec, parts.config, parts.dims)
        load_hf_weights(model, spec, _FirstRows(SafetensorsReader(path), spec), parts.dims)
        return cls(model, parts.dims, offload=parts.config.teacher.offload)


def _path(path: str | None) -> Path:
    if path is None:
        raise ConfigError("teacher.policy=separate needs teacher.path, a Hugging Face directory or Hub name")
    return resolve_model_path(path, option="teacher.path")


def _check_vocabulary(path: Path, tokenizer: PreTrainedTokenizerBase, spec: Qwen3Spec, student: StudentFiles) -> None:
    """Check that the teacher's logits mean the same tokens as the student's, and that it reads the same prompts.

    Raises:
        ModelError: They do not; names what differs.
    """
    ours, theirs = student.tokenizer.get_vocab(), tokenizer.get_vocab()
    different = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)), key=repr
    )
    if different:
        token = different[0]
        raise ModelError(
            f"the teacher, {path}, has another vocabulary than the student, {student.source}: {len(different)} tokens "
            f"differ, such as {token!r} (id {ours.get(token)} of the student, {theirs.get(token)} of the teacher); "
            "probabilities are compared token by token: choose a teacher with the student's tokenizer"
        )
    if spec.vocab_size < student.spec.vocab_size:
        raise ModelError(
            f"the teacher, {path}, has vocab_size={spec.vocab_size} in its config.json, the student "
            f"{student.spec.vocab_size}: the teacher would have no logits for the last of them"
        )
    thinking = student.config.data.teacher_thinking
    rendered = [_render(of, thinking) for of in (student.tokenizer, tokenizer)]
    if None not in rendered and rendered[0] != rendered[1]:
        raise ModelError(
            f"the chat templates of the teacher, {path}, and of the student, {student.source}, which renders the "
            f"teacher's prompts, differ with data.teacher_thinking={str(thinking).lower()}: {rendered[1]!r} and "
            f"{rendered[0]!r}; try the other value, or make a copy of the teacher's directory with the student's "
            "template"
        )


def _render(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> str | None:
    """A question up to where the response begins; ``None`` without a chat template, as base models may be."""
    if tokenizer.chat_template is None:
        return None
    message = [{"role": "user", "content": "..."}]
    return str(
        tokenizer.apply_chat_template(message, add_generation_prompt=True, enable_thinking=thinking, tokenize=False)
    )


class _FirstRows:
    """A model's tensors with the vocabulary cut to ``spec.vocab_size`` rows."""

    def __init__(self, reader: SafetensorsReader, spec: Qwen3Spec) -> None:
        self._reader, self._spec = reader, spec

    def names(self) -> Iterable[str]:
        return self._reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._reader.shape(name)
        vocabulary = name.split(".")[-2] in ("embed_tokens", "lm_head")
        return (min(shape[0], self._spec.vocab_size), *shape[1:]) if vocabulary else shape

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(name)

    def get(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        return self._reader.get(name, rows, columns)
