"""The memory estimate: what is exact against hand-made figures, and how the rest moves with the settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsd_megatron.config import Config
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.memory import LOSS_WORKSPACE, OTHER, MemoryEstimate, estimate_memory
from tests.unit.models.published import PUBLISHED, write_config


def estimate(directory: Path, size: str, world_size: int, **settings: object) -> MemoryEstimate:
    config = Config()
    for key, value in settings.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return estimate_memory(read_spec(write_config(directory, PUBLISHED[size][0])), config, world_size)


def test_one_gpu_holds_all_parameters(tmp_path: Path) -> None:
    parameters = PUBLISHED["1.7B"][1]
    one = estimate(tmp_path, "1.7B", 1)
    assert (one.weights, one.teacher, one.engine_weights) == (2 * parameters,) * 3
    assert (one.gradients, one.optimizer) == (4 * parameters, 12 * parameters)
    # 28 layers, 8 key/value heads of 128, both, 2 bytes.
    assert one.cache_token == 28 * 8 * 128 * 2 * 2
    four = estimate(tmp_path, "1.7B", 4)
    assert (four.gradients, four.optimizer) == (4 * parameters, 3 * parameters)
    assert estimate(tmp_path, "1.7B", 4, parallel__distributed_optimizer=False).optimizer == 12 * parameters
    single = estimate(tmp_path, "1.7B", 1, model__dtype="float32")
    assert (single.weights, single.gradients, single.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)


def test_a_checkpoint_holds_all_weights_and_what_training_goes_on_with(tmp_path: Path) -> None:
    parameters, layers = PUBLISHED["1.7B"][1], 28

    def checkpoint(**settings: object) -> float:
        return estimate(tmp_path, "1.7B", 4, **settings).checkpoint / parameters

    assert checkpoint() == 2 + 12
    assert checkpoint(model__dtype="float32") == 4 + 12
    assert checkpoint(model__dtype="float32", parallel__distributed_optimizer=False) == 4 + 8
    assert checkpoint(teacher__policy="ema") == checkpoint() + 4
    assert checkpoint(teacher__policy="refresh") == checkpoint() + 2
    adapters = layers * 64 * (2048 + 2048) / parameters  # of q_proj, which is square
    adapted = checkpoint(lora__rank=64, lora__targets=["q_proj"], teacher__policy="adapter_off")
    assert adapted == pytest.approx(2 + (2 + 12) * adapters, abs=1e-9)
    assert checkpoint(parallel__tensor=4) == checkpoint(rollout__tensor=1) == checkpoint()


def test_tensor_parallelism_cuts_all_but_the_norms(tmp_path: Path) -> None:
    whole, parts = estimate(tmp_path, "8B", 4), estimate(tmp_path, "8B", 4, parallel__tensor=4)
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    assert 4 * parts.weights == whole.weights + 3 * 2 * norms
    assert parts.engine_weights == whole.engine_weights // 4
    assert parts.cache_token == whole.cache_token // 4
    # What an optimizer shares out over four ranks with equal weights, it keeps whole on four with different ones.
    assert parts.optimizer == 6 * parts.weights


def test_an_engine_repeats_heads_that_its_ranks_share(tmp_path: Path) -> None:
    def together(engine: int) -> int:
        return engine * estimate(tmp_path, "1.7B", 16, rollout__tensor=engine).engine_weights

    assert together(8) == together(1)
    assert together(16) - together(1) == 2 * 28 * 2 * 8 * 128 * 2048  # 8 heads' keys and values, in bfloat16


def test_a_tied_pipeline_holds_the_embedding_at_both_ends(tmp_path: Path) -> None:
    embedding, layer = 151936 * 2048, (1_720_574_976 - 151936 * 2048 - 2048) // 28
    piped = estimate(tmp_path, "1.7B", 2, parallel__pipeline=2)
    assert piped.weights == 2 * (14 * layer + embedding + 2048)  # the last stage, with the final norm


def test_experts_are_shared_out_over_their_own_mesh(tmp_path: Path) -> None:
    experts = 48 * 128 * 3 * 2048 * 768
    dense = PUBLISHED["30B-A3B"][1] - experts
    spread = estimate(tmp_path, "30B-A3B", 16, parallel__expert=8)
    assert spread.weights == 2 * (dense + experts // 8)
    assert spread.optimizer == 12 * (dense // 16 + experts // 8 // 2)


@pytest.mark.parametrize("settings", [{"teacher__policy": "live"}, {"objective__name": "sft"}])
def test_no_teacher_of_its_own_takes_no_memory(tmp_path: Path, settings: dict[str, object]) -> None:
    assert estimate(tmp_path, "1.7B", 1, **settings).teacher == 0


def test_an_average_is_kept_in_float32_and_shared_out(tmp_path: Path) -> None:
    parameters = PUBLISHED["1.7B"][1]
    assert estimate(tmp_path, "1.7B", 4, teacher__policy="ema").teacher == 2 * parameters + parameters


def test_a_separate_teacher_has_its_own_size(tmp_path: Path) -> None:
    config = Config()
    config.teacher.policy = "separate"
    small, large = (read_spec(write_config(tmp_path, PUBLISHED[size][0])) for size in ("1.7B", "8B"))
    made = estimate_memory(small, config, 1, separate=large)
    assert (made.weights, made.teacher) == (2 * PUBLISHED["1.7B"][1], 2 * PUBLISHED["8B"][1])


def test_a_trust_region_lays_two_heads_side_by_side(tmp_path: Path) -> None:
    """On the last stage and while a step lasts."""
    frozen, mixed = (
        estimate(tmp_path, "8B", 4, teacher__policy=policy, parallel__pipeline=2, parallel__tensor=2)
        for policy in ("frozen", "trust_region")
    )
    assert mixed.teacher - frozen.teacher == 2 * 2 * 151936 * 4096 // 2
    assert mixed.sampling(0) == frozen.sampling(0)


def test_of_adapters_only_the_adapters_have_gradients(tmp_path: Path) -> None:
    rank, tp = 64, 2
    query, key, hidden, ffn = 16 * 128, 8 * 128, 2048, 6144
    by_rows = [(query, hidden), (key, hidden), (key, hidden), (ffn, hidden), (ffn, hidden)]
    by_columns = [(hidden, query), (hidden, ffn)]
    adapters = (
        28
        * rank
        * (
            sum(rows // tp + columns for rows, columns in by_rows)
            + sum(rows + columns // tp for rows, columns in by_columns)
        )
    )
    settings: dict[str, object] = {"parallel__tensor": tp, "teacher__policy": "adapter_off"}
    without = estimate(tmp_path, "1.7B", 8, **settings)
    made = estimate(tmp_path, "1.7B", 8, lora__rank=rank, **settings)
    assert made.weights - without.weights == 2 * adapters
    assert (made.gradients, made.optimizer, made.teacher) == (4 * adapters, 12 * (adapters // 4), 0)


def test_what_is_offloaded_makes_room_for_sampling(tmp_path: Path) -> None:
    both = estimate(tmp_path, "1.7B", 4, train__offload=True, teacher__offload=True)
    assert both.sampling(0) == both.weights + OTHER
    assert both.training == estimate(tmp_path, "1.7B", 4).training


def test_activations_of_a_dense_layer(tmp_path: Path) -> None:
    tokens, layer = 1000, 4 * 2048 + 4 * (16 + 8) * 128 + 4 * 6144
    settings: dict[str, object] = {"train__tokens_per_micro_batch": tokens, "data__max_prompt_tokens": 100}
    settings["rollout__max_new_tokens"] = 100
    every = [estimate(tmp_path, "1.7B", 1, model__recompute=kept, **settings) for kept in ("none", "selective", "full")]
    kept = [layer, layer - 4 * 6144, 2048]
    assert [each.activations for each in every] == [2 * tokens * (28 * each + layer) for each in kept]
    # A sample longer than the budget is a micro-batch of its own.
    settings["rollout__max_new_tokens"] = 1900
    assert estimate(tmp_path, "1.7B", 1, **settings).activations == 2 * every[0].activations
    assert estimate(tmp_path, "1.7B", 2, parallel__context=2, **settings).activations == every[0].activations


def test_ranks_that_share_a_key_value_head_keep_more(tmp_path: Path) -> None:
    """By hand: 16 query heads and 8 key/value heads of 128, one and a whole one of which 16 ranks have."""
    settings: dict[str, object] = {"parallel__sequence": True, "model__recompute": "selective"}
    shared, own = (estimate(tmp_path, "1.7B", tp, parallel__tensor=tp, **settings).activations for tp in (16, 8))
    elements = {16: 4 * 2048 / 16 + 4 * (1 + 1) * 128 + (16 + 2 * 8) * 128, 8: 4 * 2048 / 8 + 4 * (2 + 1) * 128}
    mlp = {tp: 4 * 6144 / tp for tp in elements}
    assert shared / own == pytest.approx((29 * elements[16] + mlp[16]) / (29 * elements[8] + mlp[8]), rel=1e-6)


def test_a_pipeline_keeps_several_micro_batches(tmp_path: Path) -> None:
    one, two = (estimate(tmp_path, "1.7B", 2, parallel__pipeline=size).activations for size in (1, 2))
    assert one == two  # half of the layers, twice
    assert estimate(tmp_path, "1.7B", 2, parallel__pipeline=2, parallel__virtual_stages=2).activations > two


def test_sums_and_text(tmp_path: Path) -> None:
    made = estimate(tmp_path, "1.7B", 4)
    assert made.resident == made.weights + made.gradients + made.optimizer + made.teacher + OTHER
    assert made.training == made.resident + made.activations + LOSS_WORKSPACE
    assert made.sampling(10**9) == made.resident + 10**9
    assert made.cache_tokens(made.engine_weights + LOSS_WORKSPACE + 10 * made.cache_token) == 10
    assert str(made).startswith("estimated GB of each GPU: weights 3.4, gradients 6.9, optimizer 5.2, teacher 3.4, ")
