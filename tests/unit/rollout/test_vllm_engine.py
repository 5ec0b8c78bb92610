"""The parts of the vLLM engine that need no vLLM, and its sleep with a stand-in for vLLM that keeps its rules.

The engine itself is in tests/functional/test_engine.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from opsd_megatron.errors import EngineError
from opsd_megatron.rollout.engine import Sampling
from opsd_megatron.rollout.vllm_engine import VllmEngine, _generation, share
from opsd_megatron.types import Generation

T = TypeVar("T")


@pytest.mark.parametrize(("num", "replicas"), [(0, 1), (1, 4), (7, 3), (8, 4), (33, 2)])
def test_shares_tile_and_balance(num: int, replicas: int) -> None:
    shares = [share(num, replicas, replica) for replica in range(replicas)]
    assert [index for own in shares for index in own] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def request(tokens: list[int], log_probs: list[float], of: list[int] | None = None) -> Any:
    """A finished request, its log-probs in vLLM's flat form."""
    flat = SimpleNamespace(token_ids=of or tokens, logprobs=log_probs)
    return SimpleNamespace(outputs=[SimpleNamespace(finish_reason="stop", token_ids=tokens, logprobs=flat)])


def test_a_response_comes_with_its_tokens_log_probs() -> None:
    assert _generation(request([3, 4], [-1.0, -2.0])) == Generation((3, 4), (-1.0, -2.0), "stop")
    with pytest.raises(EngineError, match="log-probs of other tokens than it sampled"):
        _generation(request([3, 4], [-1.0, -2.0], of=[3, 5]))


def test_log_probs_that_are_not_finite_are_errors() -> None:
    for value in (float("nan"), float("-inf")):
        with pytest.raises(EngineError, match="log-probs that are not finite"):
            _generation(request([3], [value]))


class SleepingLlm:
    """Sleeps and wakes as vLLM's executor does, but raises where that one logs a warning and does nothing.

    ``forgets``: whether a sleep at level 2 loses more of the model than an update brings back.
    """

    def __init__(self, *, forgets: bool = False) -> None:
        self.asleep: set[str] = set()
        self.done: list[str] = []
        self._forgets, self._log_prob = forgets, -0.5
        self.model = torch.nn.Module()
        self.model.lm_head = torch.nn.Linear(2, 3)
        self.model.lm_head.quant_method = SimpleNamespace(process_weights_after_loading=lambda head: None)  # type: ignore[assignment]
        self.model.model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(3, 2)})

    def sleep(self, level: int) -> None:
        assert "weights" not in self.asleep, "already asleep"
        self.asleep = {"weights", "kv_cache"}
        self.done.append("sleep" if level == 1 else "drop")
        if level == 2 and self._forgets:
            self._log_prob -= 1e-7

    def generate(self, prompts: list[Any], *_: Any, **__: Any) -> list[Any]:
        assert not self.asleep
        self.done.append("sample")
        return [request([3], [self._log_prob]) for _ in prompts]

    def wake_up(self, tags: list[str]) -> None:
        assert tags and self.asleep.issuperset(tags), f"{tags} are not all asleep"
        self.asleep -= set(tags)
        self.done.append("wake " + " ".join(tags))

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights" and "weights" not in self.asleep
        for _ in kwargs["weights_iterator"]:
            pass
        self.done.append("update")

    def apply_model(self, function: Callable[[torch.nn.Module], T]) -> list[T]:
        return [function(self.model)]

    def reset_prefix_cache(self) -> None:
        pass


def sleeping_engine(
    *, can_sleep: bool = True, forgets: bool = False, has_weights: bool = False
) -> tuple[VllmEngine, SleepingLlm]:
    llm = SleepingLlm(forgets=forgets)
    sizes = {"replicas": 1, "replica": 0, "max_length": 8}
    return VllmEngine(llm, [0], **sizes, can_sleep=can_sleep, has_weights=has_weights), llm  # type: ignore[arg-type]


def test_a_synced_engine_wakes_for_its_cache_only() -> None:
    engine, llm = sleeping_engine()
    engine.sleep()
    for _ in range(2):  # two steps of a run
        engine.update_weights(iter([("a", torch.ones(1))]))
        engine.wake_up()
        engine.wake_up()
        assert not llm.asleep
        engine.sleep()
        engine.sleep()
    assert llm.done == ["sleep"] + ["wake weights", "update", "wake kv_cache", "sleep"] * 2


def test_a_synced_engine_goes_back_to_sleep() -> None:
    engine, llm = sleeping_engine()
    engine.sleep()
    engine.update_weights(iter([]))
    engine.update_weights(iter([]))
    engine.sleep()
    engine.wake_up()
    assert llm.done == ["sleep", "wake weights", "update", "update", "sleep", "wake kv_cache weights"]


def test_an_awake_engine_is_updated_in_place() -> None:
    for can_sleep in (True, False):
        engine, llm = sleeping_engine(can_sleep=can_sleep)
        engine.update_weights(iter([]))
        engine.wake_up()
        assert llm.done == ["update"]


def test_on_cpu_a_sleep_drops_weights_that_were_sent_and_no_others() -> None:
    engine, llm = sleeping_engine(can_sleep=False)
    engine.update_weights(iter([]))
    llm.model.lm_head.cpu_linear = "packed"  # type: ignore[assignment]
    engine.sleep()
    assert llm.model.lm_head.cpu_linear is None and not engine.holds_weights
    engine.update_weights(iter([]))
    assert engine.holds_weights

    engine, llm = sleeping_engine(can_sleep=False, has_weights=True)
    llm.model.lm_head.cpu_linear = "packed"  # type: ignore[assignment]
    engine.sleep()
    assert llm.model.lm_head.cpu_linear == "packed" and engine.holds_weights


@pytest.mark.parametrize("forgets", [False, True])
def test_weights_are_dropped_asleep_only_where_all_comes_back(monkeypatch: pytest.MonkeyPatch, forgets: bool) -> None:
    monkeypatch.setattr("opsd_megatron.rollout.vllm_engine._sampling_params", lambda *_: None)
    monkeypatch.setattr(VllmEngine, "_gather", lambda _, own: own)
    engine, llm = sleeping_engine(forgets=forgets)

    def send() -> None:
        engine.update_weights(iter([]))

    send()
    if forgets:
        with pytest.raises(EngineError, match=r"rollout\.sleep_level=1"):
            engine.drop_weights_asleep(send)
        return
    engine.drop_weights_asleep(send)
    assert llm.done == ["update", "sample", "drop", "wake weights", "update", "wake kv_cache", "sample"]
    assert engine.holds_weights
    engine.sleep()
    assert not engine.holds_weights  # so that whoever samples next sends them first
    assert llm.done[-1] == "drop"


def test_random_missing_or_sleeping_weights_are_not_sampled_from() -> None:
    engine, _ = sleeping_engine()
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=-1, max_new_tokens=1)

    def broken() -> Any:
        yield "a", torch.ones(1)
        raise RuntimeError("the trainer's export failed")

    def refuses() -> None:
        with pytest.raises(AssertionError, match="update_weights must run before generate"):
            engine.generate([[1]], greedy, seeds=[0])

    refuses()
    engine.update_weights(iter([]))
    with pytest.raises(RuntimeError, match="export failed"):
        engine.update_weights(broken())
    refuses()
    engine.sleep()
    engine.update_weights(iter([]))
    with pytest.raises(AssertionError, match=r"asleep \(kv_cache\)"):
        engine.generate([[1]], greedy, seeds=[0])
