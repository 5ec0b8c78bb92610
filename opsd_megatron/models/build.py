"""The model: Megatron-Core's GPT that hands out hidden states, on this rank's part of the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor

from opsd_megatron.config import Config
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.models.backends import Backend, block_spec, choose_backend, pack_sequences
from opsd_megatron.models.embedding import RowAccumulatingEmbedding
from opsd_megatron.models.qwen3 import Qwen3Spec, transformer_config
from opsd_megatron.models.stages import stage_layers
from opsd_megatron.models.weight_map import partition_dim, placed_parameters
from opsd_megatron.types import PackedSequences


class HiddenStatesGPT(GPTModel):
    """A ``GPTModel`` whose last stage returns hidden states after the final norm instead of logits.

    The loss multiplies by the output head itself, for response rows only and in chunks.
    """

    def __init__(self, *, backend: Backend, **options: Any) -> None:
        super().__init__(**options)
        self._backend = backend
        if self.pre_process:
            RowAccumulatingEmbedding.take_over(self.embedding.word_embeddings)

    def forward(self, sequences: PackedSequences) -> Tensor:
        """See :func:`forward_packed`."""
        return cast(
            Tensor,
            super().forward(
                input_ids=sequences.ids.unsqueeze(0),
                position_ids=sequences.positions.unsqueeze(0),
                attention_mask=None,
                packed_seq_params=pack_sequences(self._backend, sequences, self.pg_collection.cp),
            ),
        )

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def output_head(self) -> Tensor:
        """This rank's vocabulary shard of the output head, ``[V/tp, H]``, padding rows included.

        With tied embeddings it is the embedding itself, or on the last of several stages its copy, whose gradient
        Megatron-Core adds to the first stage's.

        Only the last chunk of the last pipeline rank has one.
        """
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return cast(Tensor, weight)


def build_model(spec: Qwen3Spec, config: Config, dims: ParallelDims) -> list[HiddenStatesGPT]:
    """This rank's shard of the model on ``dims.device``, with *uninitialised* weights: load them next.

    A list, as Megatron-Core's schedules want it: one chunk, or ``parallel.virtual_stages`` of them under an interleaved
    pipeline. The first chunk of the first pipeline rank embeds the tokens, the last one of the last has the output
    head.

    Ranks: every rank (with tied embeddings over several stages the first and the last one communicate).

    Raises:
        ConfigError: ``model.backend`` asks for what is not there.
    """
    backend = choose_backend(config.model.backend, dtype=config.model.dtype, on_cuda=dims.device.type == "cuda")
    own_layers = stage_layers(spec.num_layers, pp=dims.pp, vpp=dims.vpp)[dims.pp_rank]
    settings = transformer_config(spec, config, dims, backend)
    chunks = [
        HiddenStatesGPT(
            backend=backend,
            config=settings,
            transformer_layer_spec=block_spec(backend, [spec.experts_in(layer) for layer in layers], config.lora),
            vocab_size=spec.padded_vocab_size(dims.tp),
            max_sequence_length=spec.max_positions,
            pre_process=dims.is_first_stage and number == 0,
            post_process=dims.is_last_stage and number == dims.vpp - 1,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="rope" if spec.yarn is None else "yarn",
            rotary_base=spec.rope_theta,
            pg_collection=dims.pg_collection,
            vp_stage=number if dims.vpp > 1 else None,
        )
        for number, layers in enumerate(own_layers)
    ]
    _prepare_parameters(chunks, spec, dims)
    return chunks


def _prepare_parameters(chunks: Sequence[HiddenStatesGPT], spec: Qwen3Spec, dims: ParallelDims) -> None:
    """Say which parameters are shards and whose, and see that all of them are on the device.

    Megatron-Core's linear layers call a parameter a tensor-parallel shard only while they draw initial weights.
    Unmarked, it counts as a replica, and the gradient norm leaves out every rank's but the first. An expert's parameter
    is the only one of its kind in its gradient-norm group whether it is cut or not.

    Parameters with ``allreduce=False`` have their gradients summed over the ranks that hold the same experts instead
    of over data-parallel ones. Megatron-Core says so at ep > 1 only; it holds as well where experts are cut into fewer
    parts than the rest of the model, and elsewhere the two groups are the same. Saying so always also gives optimizer
    checkpoints one form.

    The router is built on the CPU (mcore 0.16.1, moe/router.py) and would move in the first forward pass, after its
    gradient buffer has been made.
    """
    for place, parameter in placed_parameters(chunks, spec, dims):
        dim = partition_dim(place.rule)
        if dim is not None and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        if place.expert is not None:
            parameter.allreduce = False  # type: ignore[attr-defined]
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.to(dims.device)


def forward_packed(model: torch.nn.Module, sequences: PackedSequences) -> Tensor:
    """Run one chunk of the model over packed sequences.

    Ranks: every rank of a tensor-parallel group; under pipeline parallelism inside Megatron-Core's schedule, which
    moves activations between stages.

    Args:
        model: A chunk that :func:`build_model` returned, plain or in Megatron-Core's data-parallel wrapper.
        sequences: On the model's device; under context parallelism this rank's part. Under sequence parallelism T is a
            multiple of tp.

    Returns:
        Hidden states ``[T, 1, H]`` (``[T/tp, 1, H]`` under sequence parallelism) in the model's dtype, after the final
        norm from the last chunk; T is this rank's part under context parallelism.
    """
    return cast(Tensor, model(sequences))
