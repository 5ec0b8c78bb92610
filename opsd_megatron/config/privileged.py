"""What each source of privileged information needs of a run: what the rules and the checks of the input go by.

A source is a row here, a class under the same name in ``data/privileged.py`` and a teacher's message under
``data/prompts/``. The row stands here so that a configuration is checked in full before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsd_megatron.errors import ConfigError

if TYPE_CHECKING:
    from opsd_megatron.config import Config


@dataclass(frozen=True)
class PrivilegedNeeds:
    """What a source takes its text from.

    Attributes:
        solutions: Every training problem's reference solution.
        answers: Every training problem's answer.
        verdicts: Whether each rollout's answer is right; every training problem then needs an answer.
        siblings: Several rollouts of each problem.
        nothing: There is no text: the teacher's message is the student's own.
    """

    solutions: bool = False
    answers: bool = False
    verdicts: bool = False
    siblings: bool = False
    nothing: bool = False


PRIVILEGED: dict[str, PrivilegedNeeds] = {
    "reference": PrivilegedNeeds(solutions=True),
    "answer": PrivilegedNeeds(answers=True),
    "siblings": PrivilegedNeeds(verdicts=True, siblings=True),
    "none": PrivilegedNeeds(nothing=True),
    "shuffled": PrivilegedNeeds(solutions=True),
}


def check_privileged(config: Config) -> None:
    """Check what ``data.privileged`` asks of other keys, where the objective has a teacher at all.

    Raises:
        ConfigError: Names the keys and what would be valid.
    """
    if not config.needs.teacher:
        return
    name, samples = config.data.privileged, config.rollout.samples_per_problem
    needs = PRIVILEGED[name]
    if needs.siblings and samples < 2:
        raise ConfigError(
            f"data.privileged={name} lets rollouts of one problem teach each other: rollout.samples_per_problem="
            f"{samples} must be at least 2"
        )
    if needs.siblings and config.needs.groups:
        raise ConfigError(
            f"data.privileged={name} leaves correct rollouts out, and objective.name={config.objective.name} compares "
            "all of a problem's with each other; use another source of privileged information"
        )
    if needs.nothing and config.data.analyse_first:
        raise ConfigError(
            f"data.analyse_first=true asks for an analysis of what the teacher sees beyond the problem, and "
            f"data.privileged={name} shows it nothing; turn one of them off"
        )
