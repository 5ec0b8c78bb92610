"""vLLM inside the trainer's own ranks: the one module that imports vllm, and only once an engine starts.

Every rank holds a slice of an engine (``distributed_executor_backend="external_launcher"``). Engine groups of
``config.engine_tensor`` neighbouring ranks tile the world; each group is a replica and draws its own share of the
prompts. vLLM runs in the trainer's process, so whatever it changes there is put back: see ``rollout.process``.

The tests run vLLM 0.32 on CPU. Its 0.31, the one in NVIDIA's container, has the same calls by its source; the CUDA
branches (sleep and wake, memory fraction) have not been run.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.config import Config
from opsd_megatron.distributed.collectives import gather_objects
from opsd_megatron.errors import EngineError
from opsd_megatron.rollout.engine import Sampling, ShardLayout
from opsd_megatron.rollout.process import (
    default_group_kept,
    prepare_environment,
    process_state_kept,
    random_state_kept,
    uncompiled_on_cpu,
)
from opsd_megatron.rollout.stop_tokens import stop_token_ids
from opsd_megatron.rollout.vllm_cpu import (
    drop_packed,
    forget_expert_kernels,
    pack_head,
    private_shared_memory,
    use_fused_kernels,
    vocabulary_in_place,
)
from opsd_megatron.rollout.vllm_cpu_sampling import draw_by_blocks
from opsd_megatron.rollout.vllm_options import engine_options, start_failure
from opsd_megatron.types import FinishReason, Generation

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import RequestOutput

# What vLLM pads a vocabulary to before it cuts it (its DEFAULT_VOCAB_PADDING_SIZE).
_VOCAB_MULTIPLE = 64
# vLLM's names of what sleeps and wakes on its own.
_SLEEP_TAGS = frozenset({"weights", "kv_cache"})


class VllmEngine:
    """A :class:`~opsd_megatron.rollout.engine.RolloutEngine` on co-located vLLM.

    What a response depends on: every request is drawn by a generator of its own, seeded with its seed, so other
    requests and the replica enter only through rounding. Measured on CPU: in float32 a response and its log-probs are
    the same bit for bit in any batch, and equal to 2e-6 between engine sizes 1 and 2. In bfloat16 matrix products round
    differently for different batch sizes: log-probs moved by up to 0.06, and in one run a response in ten changed, in
    others none (a random model of hidden size 512, 33 requests against 40). The same call on the same mesh repeats bit
    for bit in either.
    """

    def __init__(
        self,
        llm: LLM,
        stop_ids: Sequence[int],
        *,
        replicas: int,
        replica: int,
        max_length: int,
        can_sleep: bool,
        layout: ShardLayout | None = None,
        has_weights: bool = False,
    ) -> None:
        """Use :meth:`start`."""
        self.layout = layout
        self._llm: LLM | None = llm
        self._stop_ids = list(stop_ids)
        self._replicas = replicas
        self._replica = replica
        self._max_length = max_length
        self._can_sleep = can_sleep
        self._asleep: frozenset[str] = frozenset()
        self._has_weights = has_weights
        self._were_sent = False
        self._drops_weights = False

    @classmethod
    def start(cls, model_path: Path, config: Config, *, max_length: int, read_weights: bool = False) -> VllmEngine:
        """Build the model of ``model_path`` and reserve the key/value cache. Takes 10 to 30 s, most of it imports.

        The weights are random until the first :meth:`update_weights`, which replaces all of them: reading them from
        disk on every rank would be wasted. With ``read_weights`` the model's own are read instead. Megatron's process
        groups may be made before or after.

        Args:
            model_path: Hugging Face directory with ``config.json`` and, for the end-of-sequence token,
                ``generation_config.json`` or a tokenizer. Its safetensors need not be there unless they are read.
            config: ``model.dtype``, ``engine_tensor`` and ``rollout`` are used.
            max_length: Longest sequence (prompt and response) in tokens.
            read_weights: Let vLLM load the model's weights, for an engine without a trainer.

        Raises:
            EngineError: vLLM is not installed, the directory is not usable, or the model or its cache does not fit.

        Ranks: every rank of the world, after ``torch.distributed`` is initialised. What one rank finds before vLLM
        makes its groups is raised on every rank; where one rank alone fails later, the others wait for it until it
        exits.
        """
        prepare_environment()
        stop_ids: tuple[int, ...] = ()
        cause: Exception | None = None
        problem: str | None = None
        try:
            stop_ids = stop_token_ids(model_path)
            with process_state_kept():
                _import_vllm()
        except EngineError as error:
            cause, problem = error, str(error)
        _raise_on_every_rank(problem, cause)
        with process_state_kept(), private_shared_memory(), uncompiled_on_cpu():
            llm = _build_llm(model_path, config, max_length, read_weights=read_weights)
            if not torch.cuda.is_available():
                llm.apply_model(pack_head if read_weights else drop_packed)
                llm.apply_model(use_fused_kernels)
                llm.collective_rpc(draw_by_blocks)
        world, tensor = dist.get_world_size(), config.engine_tensor
        return cls(
            llm,
            stop_ids,
            replicas=world // tensor,
            replica=dist.get_rank() // tensor,
            max_length=max_length,
            can_sleep=torch.cuda.is_available(),
            # Weights that are not quantized are cut by vLLM's loaders as they come: narrowed to this rank's run.
            layout=ShardLayout(tensor, _VOCAB_MULTIPLE),
            has_weights=read_weights,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Generation]:
        """See :meth:`RolloutEngine.generate`.

        Log-probs are at temperature 1, before top-p and top-k; where ``config.needs_sampling_log_probs``, they are of
        the distribution sampled from.

        Each replica draws one run of neighbouring prompts, so that repeats of a prompt share its cached prefix.

        Raises:
            EngineError: A prompt is empty or leaves no room for a response, or the ranks of a replica disagree.
            AssertionError: :meth:`update_weights` has not run to its end since the start or a sleep that dropped the
                weights, or the engine is asleep.

        Ranks: every rank of the world with equal arguments; complete on every rank.
        """
        if not self._has_weights:
            raise AssertionError("the engine has no weights: update_weights must run before generate")
        if self._asleep:
            raise AssertionError(f"the engine is asleep ({', '.join(sorted(self._asleep))}): wake_up before generate")
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds")
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self._max_length:
                raise EngineError(
                    f"prompt {index} has {len(prompt)} tokens; the engine takes 1 to {self._max_length - 1}. "
                    "Raise model.max_length or lower data.max_prompt_tokens"
                )
        own = share(len(prompts), self._replicas, self._replica)
        with random_state_kept(), uncompiled_on_cpu():
            outputs = self._draw([prompts[i] for i in own], [seeds[i] for i in own], sampling)
        return self._gather(outputs)

    def _draw(self, prompts: list[Sequence[int]], seeds: list[int], sampling: Sampling) -> list[Generation]:
        if not prompts:  # fewer prompts than replicas
            return []
        outputs = self._running.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [_sampling_params(sampling, seed, self._stop_ids) for seed in seeds],
            use_tqdm=False,
        )
        return [_generation(output) for output in outputs]

    def _gather(self, own: list[Generation]) -> list[Generation]:
        """All replicas' generations in order. The first rank of each replica sends them, the others their hash."""
        tensor = dist.get_world_size() // self._replicas
        digest = hash(tuple(generation.token_ids for generation in own))
        mine = own if dist.get_rank() % tensor == 0 else None
        gathered = gather_objects((digest, mine))
        everything: list[Generation] = []
        for rank, (rank_digest, generations) in enumerate(gathered):
            if generations is not None:
                everything.extend(generations)
            if rank_digest != gathered[rank - rank % tensor][0]:
                raise EngineError(
                    f"ranks {rank - rank % tensor} and {rank} share an engine replica and sampled different tokens; "
                    "rollout.tensor=1 avoids it"
                )
        return everything

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """See :meth:`RolloutEngine.update_weights`. Cached prefixes are dropped: they came from the old weights.

        An engine that sleeps wakes for its weights alone; its cache stays released until :meth:`wake_up`, so that
        tensors can stream in beside the trainer's. :meth:`sleep` then gives the weights' memory up again.

        ``reload_weights`` puts every layer back into checkpoint layout, runs the model's own ``load_weights`` over the
        iterator (which shards and casts), repacks each layer once its last tensor has come and copies the result into
        the tensors the engine already uses, so CUDA graphs stay valid. Tensors are held until their layer is complete:
        the iterator must not reuse their storage, and on CPU those of the vocabulary until the engine sleeps. A
        parameter that never comes keeps its old value with no more than a log line; ``weight_sync`` therefore checks
        the names.

        Ranks: every rank of the world; each drains its iterator to the end, tensor by tensor in step, since getting
        the next one may be collective.
        """
        self._has_weights = False  # should this fail half-way, the engine holds a mixture
        self._wake({"weights"})
        with torch.no_grad(), random_state_kept(), uncompiled_on_cpu():
            if torch.cuda.is_available():
                self._reload(weights)
            else:
                self._reload_on_cpu(weights)
        left = next(weights, None)
        if left is not None:
            raise AssertionError(f"the engine stopped reading weights before {left[0]}")
        self._running.reset_prefix_cache()
        self._has_weights = self._were_sent = True

    def _reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self._running.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def _reload_on_cpu(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        (model,) = self._running.apply_model(lambda model: model)  # this process's: every rank has a worker of its own
        forget_expert_kernels(model)
        self._reload(vocabulary_in_place(model, weights))
        pack_head(model)

    @property
    def holds_weights(self) -> bool:
        """See :class:`RolloutEngine`."""
        return self._has_weights

    def wake_up(self) -> None:
        """See :meth:`RolloutEngine.wake_up`. After :meth:`update_weights` only the cache is left to wake."""
        self._wake(_SLEEP_TAGS)

    def sleep(self) -> None:
        """See :meth:`RolloutEngine.sleep`. Does nothing where the weights sleep already.

        On CPU there is nowhere else for them to be: those that were sent are dropped, those read from disk stay. That
        frees the packed copies of linear layers and of the head, not experts, which are packed in place.
        """
        if not self._can_sleep:
            if self._were_sent:
                self._running.apply_model(drop_packed)
                self._has_weights = False
        elif "weights" not in self._asleep:
            self._running.sleep(level=2 if self._drops_weights else 1)
            self._asleep = _SLEEP_TAGS
            self._has_weights = self._has_weights and not self._drops_weights

    def drop_weights_asleep(self, resend: Callable[[], object]) -> None:
        """See :meth:`RolloutEngine.drop_weights_asleep`. Does nothing on CPU, where every sleep drops them.

        vLLM's level 2 loses whatever of a model is neither sent nor saved by vLLM itself, which differs between models
        and versions. So greedy responses before and after such a sleep must agree to the last bit of their log-probs.

        Raises:
            EngineError: They do not.
        """
        if not self._can_sleep:
            return
        self.wake_up()
        before = self._probe()
        self._drops_weights = True
        self.sleep()
        resend()
        self.wake_up()
        if self._probe() != before:
            raise EngineError(
                "after a sleep that dropped its weights the engine computes other log-probs from the same weights: "
                "this vLLM does not bring all of the model back; set rollout.sleep_level=1"
            )

    def _probe(self) -> list[Generation]:
        prompts = [[first] * min(8, self._max_length - 1) for first in range(8)]
        greedy = Sampling(temperature=0.0, top_p=1.0, top_k=-1, max_new_tokens=8)
        return self.generate(prompts, greedy, seeds=[0] * len(prompts))

    def _wake(self, tags: AbstractSet[str]) -> None:
        """Wake those of ``tags`` that sleep: vLLM refuses a tag that is awake, and with it all others of the call."""
        sleeping = self._asleep & tags
        if sleeping:
            self._running.wake_up(tags=sorted(sleeping))
            self._asleep -= sleeping

    def close(self) -> None:
        """Stop the engine, free its memory and its process groups; the default group and the trainer's stay.

        Ranks: every rank of the world. Calling it again does nothing.
        """
        if self._llm is None:
            return
        with default_group_kept():
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()

    @property
    def _running(self) -> LLM:
        if self._llm is None:
            raise EngineError("the rollout engine is closed")
        return self._llm


def share(num: int, replicas: int, replica: int) -> range:
    """The indices of ``num`` items that belong to ``replica``: a run, in the replicas' order, sizes at most 1 apart."""
    return range(num * replica // replicas, num * (replica + 1) // replicas)


def _import_vllm() -> None:
    # vLLM logs while it is being imported, before it configures its logger.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"vllm cannot be imported ({error}); install the package with its cpu or gpu extra, or pass "
            "rollout.engine=scripted"
        ) from error


def _build_llm(model_path: Path, config: Config, max_length: int, *, read_weights: bool) -> LLM:
    from vllm import LLM

    # What torchrun sets and the external launcher reads; a process started without it is a world of its own.
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        return LLM(**engine_options(model_path, config, max_length, read_weights=read_weights))
    except Exception as error:
        raise EngineError(start_failure(error, config, max_length)) from error


def _sampling_params(sampling: Sampling, seed: int, stop_ids: list[int]) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        stop_token_ids=stop_ids,
        logprobs=0,  # the sampled token's only
        flat_logprobs=True,
        detokenize=False,
    )


def _generation(request: RequestOutput) -> Generation:
    output = request.outputs[0]
    reasons: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
    if output.finish_reason not in reasons or output.logprobs is None:
        raise EngineError(f"the rollout engine ended a response with {output.finish_reason!r}")
    tokens = tuple(output.token_ids)
    found = cast("FlatLogprobs", output.logprobs)
    if tuple(found.token_ids) != tokens:
        raise EngineError("the rollout engine gave log-probs of other tokens than it sampled")
    log_probs = tuple(found.logprobs)
    if not all(map(math.isfinite, log_probs)):
        raise EngineError(
            "the rollout engine computed log-probs that are not finite: its weights or its cache are broken"
        )
    return Generation(tokens, log_probs, reasons[output.finish_reason])


def _raise_on_every_rank(problem: str | None, cause: Exception | None) -> None:
    """Raise on all ranks if any has a problem, so that none waits for one that left. Ranks: every rank of the world."""
    first = next((text for text in gather_objects(problem) if text is not None), None)
    if first is not None:
        raise EngineError(problem or first) from cause
