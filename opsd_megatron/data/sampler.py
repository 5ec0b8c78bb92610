"""The order in which a run draws its problems: seeded, endless, and resumable to the problem."""

from __future__ import annotations

import random

from opsd_megatron.errors import CheckpointError


class ProblemSampler:
    """Draws problem indices step by step, epoch after epoch.

    Each epoch is a fresh permutation that depends on ``seed`` and the number of the epoch alone, so every rank draws
    the same problems without talking, and a resumed run needs to know only where in which epoch it stands. A step may
    cross the end of an epoch, or several.

    Args:
        num_problems: Problems to draw from.
        per_step: Problems of one step; may exceed ``num_problems``.
        seed: Decides the order of every epoch.
        shuffle: Without it, every epoch is in the order of the data.
    """

    def __init__(self, num_problems: int, per_step: int, *, seed: int, shuffle: bool) -> None:
        if num_problems < 1 or per_step < 1:
            raise ValueError(f"num_problems={num_problems} and per_step={per_step} must be at least 1")
        self._num_problems = num_problems
        self._per_step = per_step
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        """The epoch (from 0) that the next problem belongs to."""
        return self._epoch + self._position // self._num_problems

    def next(self) -> list[int]:
        """Indices of the next step's problems, ``per_step`` of them."""
        drawn: list[int] = []
        while len(drawn) < self._per_step:
            if self._position == self._num_problems:
                self._start_epoch(self._epoch + 1)
                self._position = 0
            taken = self._order[self._position : self._position + self._per_step - len(drawn)]
            self._position += len(taken)
            drawn += taken
        return drawn

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands, as a few integers."""
        return {
            "num_problems": self._num_problems,
            "seed": self._seed,
            "shuffle": int(self._shuffle),
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved state; the number of problems a step may differ from then.

        Raises:
            CheckpointError: The state is of other data or of another order, so it points at other problems.
        """
        for field, key, now in (
            ("num_problems", "data.train", self._num_problems),
            ("seed", "train.seed", self._seed),
            ("shuffle", "data.shuffle", int(self._shuffle)),
        ):
            if state[field] != now:
                raise CheckpointError(
                    f"the checkpoint was drawing problems with {field}={state[field]}, this run has {field}={now}: its "
                    f"place in the data means nothing here; resume with the same {key}, or start a new output_dir"
                )
        self._position = state["position"]
        self._start_epoch(state["epoch"])

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = list(range(self._num_problems))
        if self._shuffle:
            # A text seed goes through SHA-512: no relation between neighbouring seeds and epochs.
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
