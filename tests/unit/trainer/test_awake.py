"""In which order trainer and engine give up and take back memory around sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any
from unittest import mock

import pytest

from opsd_megatron.config import Config
from opsd_megatron.rollout.engine import RolloutEngine
from opsd_megatron.telemetry.timers import PhaseTimer
from opsd_megatron.trainer import trainer as module
from opsd_megatron.trainer.optimizer import Trainable
from opsd_megatron.trainer.trainer import Trainer
from opsd_megatron.types import Generation

AROUND = ["offload", "restore"]
SYNC = ["update_weights"]
SAMPLE = ["wake_up", "generate", "sleep"]


class Recorded:
    """A trainer around an engine and a trainable that only write down what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
        self.calls: list[str] = []
        self.marked: list[bool] = []
        engine = mock.Mock(spec=RolloutEngine, holds_weights=False, layout=None)
        for name in ("update_weights", "wake_up", "generate", "sleep"):
            getattr(engine, name).side_effect = self._note(name)
        engine.drop_weights_asleep.side_effect = self._try_dropping
        trainable = mock.Mock(spec=Trainable, modules=[])
        for name in AROUND:
            getattr(trainable, name).side_effect = self._note(name)
        config = Config()
        config.train.offload = bool(settings.pop("offload"))
        config.rollout.sleep_level = int(str(settings.pop("sleep_level", 1)))
        parts: dict[str, Any] = {field.name: mock.Mock() for field in fields(Trainer)}
        parts |= {"config": config, "engine": engine, "trainable": trainable, "completed": 0, "engine_version": -1}
        self.trainer, self.engine = Trainer(**parts), engine
        monkeypatch.setattr(module, "sync_weights", self._sync)

    def _note(self, name: str) -> Callable[..., list[Generation]]:
        def note(*_: object, **__: object) -> list[Generation]:
            self.calls.append(name)
            return []

        return note

    def _sync(self, engine: Any, *_: object, mark_rest: bool) -> int:
        self.marked.append(mark_rest)
        engine.update_weights(iter(()))
        engine.holds_weights = True
        return 0

    def _try_dropping(self, resend: Callable[[], object]) -> None:
        self.calls.append("drop_weights_asleep")
        resend()

    def sample(self) -> list[str]:
        """What is asked of the two while the trainer samples once."""
        self.calls.clear()
        timer = PhaseTimer()
        with self.trainer._awake(timer, "rollout") as engine:
            self.trainer._sample(engine, [(1, 2)], max_new_tokens=1, seeds=[0])
        return list(self.calls)


def test_the_trainer_s_memory_goes_first_and_comes_back_last(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, offload=True)
    assert recorded.sample() == ["offload", "update_weights", "wake_up", "generate", "sleep", "restore"]
    # An evaluation after the same step: an engine that keeps its weights asleep, as on GPUs, has them.
    assert recorded.sample() == ["offload", "wake_up", "generate", "sleep", "restore"]
    recorded.trainer.completed = 1
    assert recorded.sample() == ["offload", *SYNC, *SAMPLE, "restore"]
    # An engine whose weights were dropped asleep gets them again, without a step between.
    recorded.engine.holds_weights = False
    assert recorded.sample() == ["offload", *SYNC, *SAMPLE, "restore"]
    assert recorded.marked == [True, False, False]  # what is not handed over is marked in the first sync


def test_without_offload_the_trainer_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Recorded(monkeypatch, offload=False).sample() == SYNC + SAMPLE


def test_dropping_weights_is_tried_before_the_first_sampling_only(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, offload=True, sleep_level=2)
    assert recorded.sample() == ["offload", *SYNC, "drop_weights_asleep", *SYNC, *SAMPLE, "restore"]
    recorded.trainer.completed = 1
    assert recorded.sample() == ["offload", *SYNC, *SAMPLE, "restore"]
