"""Which settings need others to have any effect. Where they would have none they are refused, not passed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsd_megatron.config.objectives import OBJECTIVES, Needs
from opsd_megatron.config.privileged import PRIVILEGED
from opsd_megatron.config.teacher import TEACHERS
from opsd_megatron.errors import ConfigError

if TYPE_CHECKING:
    from opsd_megatron.config import Config


@dataclass(frozen=True)
class _Use:
    """When a setting has an effect, and how to say so."""

    needs: str
    met: Callable[[Config], bool]


def _objectives(what: str, has: Callable[[Needs], bool]) -> _Use:
    names = [name for name, needs in OBJECTIVES.items() if has(needs)]
    return _Use(f"{what} (objective.name {' or '.join(names)})", lambda config: config.objective.name in names)


_DIVERGENCE = _objectives("a divergence", lambda needs: needs.divergence)
_TEACHER = _objectives("a teacher", lambda needs: needs.teacher)
_SIBLINGS = _Use("data.privileged=siblings", lambda config: PRIVILEGED[config.data.privileged].siblings)
# The first update of a step is made with the weights that its responses were drawn with: their ratio is 1.
_RATIO = _Use("train.updates_per_step above 1", lambda config: config.needs.ratio and config.train.updates_per_step > 1)


def _beside(key: str) -> _Use:
    return _Use(key, lambda config: config.get(key) is not None)


def _policy(name: str) -> _Use:
    return _Use(f"teacher.policy={name}", lambda config: config.teacher.policy == name)


# Not here are settings of a recipe that may stay where another objective is chosen on top: objective.beta and clip.
USES: dict[str, _Use] = {
    "objective.top_k": _DIVERGENCE,
    "objective.top_k_side": _beside("objective.top_k"),
    "objective.top_k_tail": _beside("objective.top_k"),
    "objective.entropy_gate": _DIVERGENCE,
    "objective.entropy_gate_keep": _beside("objective.entropy_gate"),
    "objective.position_midpoint": _beside("objective.position_floor"),
    "objective.position_width": _beside("objective.position_floor"),
    "objective.importance_cap": _objectives("sampled responses", lambda needs: needs.rollouts),
    "objective.ratio_clip_low": _RATIO,
    "objective.ratio_clip_high": _RATIO,
    "objective.advantage_std": _objectives("groups of responses", lambda needs: needs.groups),
    "objective.log_ratio_clip": _Use("objective.name=sampled_token", lambda c: c.objective.name == "sampled_token"),
    "objective.grpo_weight": _Use("objective.name=opsd_grpo", lambda c: c.objective.name == "opsd_grpo"),
    "teacher.policy": _Use(_TEACHER.needs, lambda c: c.needs.teacher or TEACHERS[c.teacher.policy].may_stay),
    **{
        f"teacher.{option}": _policy(name)
        for name, holds in TEACHERS.items()
        for option in holds.options
        if option != "path"  # check_teacher has it
    },
    "data.privileged": _TEACHER,
    "data.analyse_first": _TEACHER,
    "data.analysis_max_tokens": _Use("data.analyse_first=true", lambda config: config.data.analyse_first),
    "data.teach_correct": _SIBLINGS,
    "data.sibling_thoughts": _SIBLINGS,
}


def check_uses(config: Config) -> None:
    """Check that every setting that is not at its default has an effect.

    Raises:
        ConfigError: Names the key, its value and what it needs.
    """
    defaults = type(config)()
    for key, use in USES.items():
        value, default = config.get(key), defaults.get(key)
        if value != default and not use.met(config):
            shown, resting = (str(one).lower() if isinstance(one, bool) else one for one in (value, default))
            raise ConfigError(
                f"{key}={shown} does nothing with objective.name={config.objective.name} and data.privileged="
                f"{config.data.privileged}: it needs {use.needs}; leave it at {'null' if resting is None else resting}"
            )
