"""What an engine inside the trainer's process must not change there, and the environment it is started in."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist


def prepare_environment() -> None:
    """Set the environment variables vLLM reads. Must run before the first import of vllm; calling it again is harmless.

    Variables the user has set are kept, except the one without which co-located engines cannot work.
    """
    # Engine and trainer share a process: the scheduler must run here, not in a child.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # At WARNING each rank prints a page on choices made here on purpose.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextmanager
def uncompiled_on_cpu() -> Iterator[None]:
    """On CPU, run what vLLM marks for ``torch.compile`` as it is written; the trainer's own kernels stay compiled.

    Compiling vLLM's small sampling helpers takes 4 to 16 s and a C++ compiler, and gains nothing on CPU.
    """
    if torch.cuda.is_available():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random number generators back: vLLM seeds them at its start and advances torch's as it samples."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Put back what importing and starting vLLM changes in a process that is the trainer's too.

    On CPU it replaces ``torch.set_num_threads`` by a function that does nothing, sets ``LOCAL_WORLD_SIZE`` to the
    engine's size, and adds to ``LD_PRELOAD``, which child processes would inherit. Thread count, core affinity and
    default dtype come back too: vLLM 0.32 leaves them alone here, other versions bind threads to cores.
    """
    environment, set_num_threads, threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    dtype, affinity = torch.get_default_dtype(), os.sched_getaffinity(0)
    try:
        with random_state_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM touches every name torch has deprecated
            yield
    finally:
        for name in {*os.environ, *environment}:
            if name.startswith("VLLM_"):  # its own affair
                continue
            if name in environment:
                os.environ[name] = environment[name]
            else:
                del os.environ[name]
        torch.set_num_threads = set_num_threads
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if os.sched_getaffinity(0) != affinity:
            os.sched_setaffinity(0, affinity)


@contextmanager
def default_group_kept() -> Iterator[None]:
    """Keep the default process group, which the trainer still uses: vLLM's shutdown destroys it with its own groups."""
    destroy = dist.destroy_process_group

    def destroy_given(group: dist.ProcessGroup | None = None) -> None:
        if group is not None:
            destroy(group)

    dist.destroy_process_group = destroy_given
    try:
        yield
    finally:
        dist.destroy_process_group = destroy
