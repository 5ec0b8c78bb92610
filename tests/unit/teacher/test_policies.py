from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from opsd_megatron.checkpoint.hf_io import SafetensorsReader
from opsd_megatron.config import Config, TeacherConfig
from opsd_megatron.config.teacher import TEACHERS, check_teacher
from opsd_megatron.data.packing import pack
from opsd_megatron.distributed.parallel import ParallelDims
from opsd_megatron.distributed.seed import seed_everything
from opsd_megatron.errors import ConfigError
from opsd_megatron.models.build import HiddenStatesGPT, build_model, forward_packed
from opsd_megatron.models.families import read_spec
from opsd_megatron.models.hidden import response_hidden
from opsd_megatron.models.qwen3 import Qwen3Spec
from opsd_megatron.models.tokenizer import load_tokenizer
from opsd_megatron.models.weight_map import load_hf_weights
from opsd_megatron.teacher.base import StudentFiles, TeacherPolicy
from opsd_megatron.teacher.frozen import FrozenTeacher
from opsd_megatron.teacher.live import LiveTeacher
from opsd_megatron.teacher.policies import POLICIES, policy_class
from opsd_megatron.teacher.trust_region import TrustRegionTeacher
from opsd_megatron.trainer.optimizer import make_trainable
from opsd_megatron.types import AlignedSample, PackedMicroBatch
from tests.distributed import run_distributed
from tests.tiny import make_tiny_qwen3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("tiny"), hidden_size=128, ffn=384)


def load(path: Path, spec: Qwen3Spec, config: Config, dims: ParallelDims) -> list[HiddenStatesGPT]:
    model = build_model(spec, config, dims)
    load_hf_weights(model, spec, SafetensorsReader(path), dims)
    return model


def batches() -> list[PackedMicroBatch]:
    """Long enough for every matrix product to take the blocked routes of real runs."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(256, (count,), generator=draw).tolist())

    samples = [AlignedSample(prompt, prompt, ids(30 + i % 7)) for i in range(32) for prompt in [ids(27 + i % 3)]]
    return [pack(samples, with_teacher=True), pack([], with_teacher=True)]


def _compare(path: Path) -> tuple[list[bool], float, float]:
    """Whether frozen and live teacher equal the student, how far they are apart once it moved, and the mix's error."""
    config = Config()
    config.model.dtype, config.parallel.tensor = "float32", 2
    dims = ParallelDims.initialize(config.parallel)
    seed_everything(0, dims)
    spec = read_spec(path)
    student = load(path, spec, config, dims)
    frozen = FrozenTeacher(load(path, spec, config, dims), dims)
    trainable = make_trainable(student, config)
    live = LiveTeacher(student, dims)
    equal = []
    micro_batches = batches()
    for policy in (frozen, live):
        for batch, targets in zip(micro_batches, policy.targets(micro_batches), strict=True):
            assert targets is not None and not targets.hidden.requires_grad and not targets.head_weight.requires_grad
            hidden = response_hidden(forward_packed(trainable.chunks[0], batch.student), batch.student.rows, dims)
            head = student[0].output_head()
            equal += [torch.equal(hidden, targets.hidden), torch.equal(head, targets.head_weight)]
    with torch.no_grad():
        for parameter in student[0].parameters():
            parameter.add_(0.01)
    policies = (frozen, live, TrustRegionTeacher(frozen, live, mix=0.25))
    sides = [targets for policy in policies if (targets := policy.targets(micro_batches[:1])[0]) is not None]
    initial, current, mixed = (side.hidden.double() @ side.head_weight.T.double() for side in sides)
    wrong = (mixed - torch.lerp(initial, current, 0.25)).abs().max().item()
    return equal, (sides[0].hidden - sides[1].hidden).abs().max().item(), wrong


def test_equal_weights_and_prompts_give_equal_bits(tiny: Path) -> None:
    """Frozen or live, the teacher's pass rounds like the student's; and only the live one follows the student.

    The trust-region teacher's logits lie between theirs.
    """
    for equal, distance, wrong in run_distributed(_compare, 2, tiny):
        assert equal == [True] * 8
        assert distance > 0.01
        assert wrong < 1e-5


@pytest.mark.parametrize("name", ["live", "adapter_off"])
def test_the_students_weights_cannot_rest(name: str, tiny: Path) -> None:
    config, spec = Config(), read_spec(tiny)
    config.teacher.policy, config.teacher.offload, config.lora.rank = name, True, 2
    with pytest.raises(ConfigError, match=rf"teacher\.offload=true .* teacher\.policy={name}: .* the student's"):
        POLICIES[name].check(StudentFiles(config, tiny, spec, load_tokenizer(tiny, spec), 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_decay": 1.0}, r"teacher\.ema_decay=1\.0 must be at least 0 and below 1"),
        ({"ema_decay": -0.1}, r"teacher\.ema_decay=-0\.1 must be"),
        ({"ema_decay": float("nan")}, r"teacher\.ema_decay=nan must be"),
        ({"refresh_every": 0}, r"teacher\.refresh_every=0 must be at least 1"),
        ({"trust_region_mix": 1.0}, r"trust_region_mix=1\.0 .* the ends are teacher\.policy=frozen and"),
        ({"path": "/model", "policy": "ema"}, r"teacher\.path=/model is for teacher\.policy=separate, not ema"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    check_teacher(TeacherConfig())
    with pytest.raises(ConfigError, match=message):
        check_teacher(TeacherConfig(**settings))


def test_what_policies_hold_is_told_of_each_and_of_no_other() -> None:
    assert TEACHERS.keys() == POLICIES.keys()
    options = [option for holds in TEACHERS.values() for option in holds.options]
    assert set(options) | {"policy", "offload"} == {field.name for field in fields(TeacherConfig)}
    for name, holds in TEACHERS.items():
        # What is kept in a checkpoint is kept by the class.
        stores = POLICIES[name].sharded_state is not TeacherPolicy.sharded_state
        assert stores == (holds.saved != "nothing"), name


def test_unknown_policies_are_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.policy='froze' is not one of frozen, live, "):
        policy_class("froze")
