"""The group ``teacher`` of the configuration, what each policy holds, and the rules that hold for every policy.

A policy is a row of ``TEACHERS`` and a class under the same name in ``teacher/policies.py``. The row stands here so
that a configuration is checked before torch is imported, and memory is estimated without a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

from opsd_megatron.errors import ConfigError


@dataclass(frozen=True)
class TeacherHolds:
    """What a policy takes beside the student, and which settings are its own.

    Attributes:
        copy: Weights that only the teacher uses, in the model's dtype.
        average: A float32 average of the student's weights, shared out as the optimizer's state is.
        heads: Copies of its own and of the student's head, laid side by side for the length of a step.
        saved: What goes into a checkpoint: the ``average``, the ``copy`` or ``nothing``.
        options: Settings of the group that belong to this policy.
        may_stay: Chosen by recipes, so it may stay where an objective without a teacher is chosen on top.
    """

    copy: bool = False
    average: bool = False
    heads: bool = False
    saved: str = "nothing"
    options: tuple[str, ...] = ()
    may_stay: bool = False


TEACHERS: dict[str, TeacherHolds] = {
    "frozen": TeacherHolds(copy=True),
    "adapter_off": TeacherHolds(may_stay=True),
    "live": TeacherHolds(),
    "ema": TeacherHolds(copy=True, average=True, saved="average", options=("ema_decay",)),
    "refresh": TeacherHolds(copy=True, saved="copy", options=("refresh_every",)),
    "separate": TeacherHolds(copy=True, options=("path",)),
    "trust_region": TeacherHolds(copy=True, heads=True, options=("trust_region_mix",)),
}


@dataclass
class TeacherConfig:
    """Where the teacher's weights come from.

    Attributes:
        policy: ``frozen``: the initial weights. ``adapter_off``: the same without a copy of them, the student with its
            adapters switched off (needs ``lora.rank``). ``live``: the student's current ones. ``ema``: an average that
            follows them. ``refresh``: a copy of them, taken from time to time. ``separate``: another model, of any
            size, with the same vocabulary. ``trust_region``: logits between those of the initial and of the student's
            current weights.
        path: Hugging Face directory or Hub name of the ``separate`` teacher.
        ema_decay: What the ``ema`` keeps of itself at each step; float32, whatever ``model.dtype`` is.
        refresh_every: Steps between copies of the ``refresh`` policy.
        trust_region_mix: Share of the student's logits in those of the ``trust_region`` teacher; the rest is the
            initial weights'.
        offload: Keep weights that only the teacher uses in pinned host memory outside its passes (CUDA only; without
            effect on CPU).
    """

    policy: str = "frozen"
    path: str | None = None
    ema_decay: float = 0.99
    refresh_every: int = 10
    trust_region_mix: float = 0.5
    offload: bool = False


def check_teacher(teacher: TeacherConfig) -> None:
    """Check the group but for what the policy itself checks, with the model at hand (``teacher``).

    Raises:
        ConfigError: Names the key, its value and what would be valid.
    """
    if not 0 <= teacher.ema_decay < 1:
        raise ConfigError(f"teacher.ema_decay={teacher.ema_decay} must be at least 0 and below 1")
    if teacher.refresh_every < 1:
        raise ConfigError(f"teacher.refresh_every={teacher.refresh_every} must be at least 1")
    if not 0 < teacher.trust_region_mix < 1:
        raise ConfigError(
            f"teacher.trust_region_mix={teacher.trust_region_mix} must be above 0 and below 1; the ends are "
            "teacher.policy=frozen and teacher.policy=live"
        )
    owner = next(name for name, holds in TEACHERS.items() if "path" in holds.options)
    if teacher.path is not None and teacher.policy != owner:
        raise ConfigError(f"teacher.path={teacher.path} is for teacher.policy={owner}, not {teacher.policy}")
