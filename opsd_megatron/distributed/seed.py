"""Random state of every library that draws numbers."""

from __future__ import annotations

import random

import numpy as np
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from opsd_megatron.distributed.parallel import ParallelDims


def seed_everything(seed: int, dims: ParallelDims) -> None:
    """Seed Python, NumPy, torch and Megatron-Core's model-parallel random state.

    Python, NumPy and torch get the same seed on every rank, so that whatever they plan is planned alike everywhere.
    Megatron-Core adds the tensor-parallel rank, or an expert's, where shards must differ.

    Ranks: every rank, after the mesh is built; needed before a model is built or recomputes activations.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=dims.tp_rank, ep_rank=dims.ep_rank, etp_rank=dims.etp_rank)
