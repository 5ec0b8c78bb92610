"""What the trainer and the evaluation need of a rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opsd_megatron.types import Generation


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. ``temperature`` 0 is greedy; ``top_k`` -1 keeps all candidates."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True)
class ShardLayout:
    """Which part of each full tensor a rank of an engine reads.

    The ``tensor`` neighbouring ranks of a replica cut matrices as Megatron-Core's tensor parallelism does, in equal
    runs of rows or columns in rank order; the vocabulary is padded to a multiple of ``vocab_multiple`` first.
    """

    tensor: int
    vocab_multiple: int


class RolloutEngine(Protocol):
    """An engine co-located with the trainer. Every method is collective.

    It samples only after the first :meth:`update_weights`, and only while it is awake.

    Ranks: every rank of the world calls every method, with equal arguments.

    Attributes:
        layout: Which part of a tensor this rank reads in :meth:`update_weights`; ``None`` where it reads all of it.
        holds_weights: Whether it has the weights of the last :meth:`update_weights`.
    """

    layout: ShardLayout | None

    @property
    def holds_weights(self) -> bool:
        """See the class."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Generation]:
        """Sample one response for each prompt (repeat a prompt to draw more).

        Args:
            prompts: All prompts of the call, equal on every rank; the engine shares them out over its replicas.
            sampling: How to draw.
            seeds: One seed for each prompt: a response depends on its prompt, its seed and the weights, not on which
                replica drew it.

        Returns:
            One generation for each prompt in the order given, complete on every rank.
        """
        ...

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace the engine's weights by the full Hugging Face tensors that ``weights`` yields on every rank.

        Of a tensor, only the part that ``layout`` gives to this rank need be filled in. Their memory must last, with
        the same values, until the engine has slept.

        Awake or asleep. An engine that slept holds memory for its weights afterwards: :meth:`sleep` again unless
        :meth:`wake_up` follows at once.
        """
        ...

    def wake_up(self) -> None:
        """Take back the device memory given up by :meth:`sleep`. A no-op on CPU."""
        ...

    def sleep(self) -> None:
        """Give up device memory until :meth:`wake_up`. A no-op while asleep.

        Weights move to host memory, or are dropped: on CPU, and after :meth:`drop_weights_asleep`. Where
        :attr:`holds_weights` is false they have to be sent again.
        """
        ...

    def drop_weights_asleep(self, resend: Callable[[], object]) -> None:
        """Drop weights in every :meth:`sleep` from now on, which saves their way to the host and back.

        Args:
            resend: Calls :meth:`update_weights` with the weights that the engine has now: one such sleep is tried.
        """
        ...

    def close(self) -> None:
        """Stop the engine and free what it holds."""
        ...
