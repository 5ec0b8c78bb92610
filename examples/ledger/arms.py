"""What the ledger compares: arms as rows of data, each a set of overrides of the quickstart's distillation.

Every arm trains 30 steps on the same 960 problems (GRPO, which draws eight responses to each, on 240 of them) from the
same base model and is evaluated on the same 512 held-out ones. An arm that is added or changed here is run by the next
``make ledger``; the others are not run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

STEPS = 30
MAIN_SEEDS = (0, 1, 2)
ONE_SEED = (0,)

BETAS = {"0": "forward KL", "0.5": "Jensen-Shannon", "1": "reverse KL"}
CLIP_MODES = ("entry", "bregman", "rescale", "token", "none")
# Beta and clip mode. In between the two KLs bregman is entry: their losses and runs are equal bit for bit.
DIVERGENCES = tuple((beta, mode) for beta in BETAS for mode in CLIP_MODES if (beta, mode) != ("0.5", "bregman"))
TAU = "0.05"
OTHER_TAUS = ("0.01", "0.25")
# Those so near each other when the first runs were in that the controls decide between them.
LEVEL = (("0", "rescale"), ("0.5", "entry"), ("0.5", "rescale"), ("0.5", "none"), ("1", "rescale"), ("1", "none"))
# Without a reference a teacher of equal bits says exactly what the student says. ``rounded`` are the base's weights
# rounded to bfloat16 once: the two sides then differ as they do on a device that rounds by batch shape.
CONTROLS = {
    "none": "no reference",
    "rounded": "no reference, rounded teacher",
    "shuffled": "another problem's reference",
}
_CONTROL_OVERRIDES = {
    "none": {"data.privileged": "none"},
    "rounded": {"data.privileged": "none", "teacher.policy": "separate"},
    "shuffled": {"data.privileged": "shuffled"},
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Unique; letters, digits, dots and underscores.
        group: What it is compared with: ``baseline``, ``opsd``, ``variant``, ``tau``, or ``control_`` and
            one of ``CONTROLS``, with names that end in that of the arm they belong to.
        title: For tables.
        overrides: Hydra overrides of ``experiment=quickstart_opsd``, beyond those of :func:`common_overrides`.
        seeds: Which seeds it is run with unless told otherwise.
        evaluates_base: Also evaluate before the first step: once for each base and seed is enough.
    """

    name: str
    group: str
    title: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = MAIN_SEEDS
    evaluates_base: bool = False


def common_overrides(arm: Arm, seed: int) -> dict[str, str]:
    """What all arms have in common and the quickstart has not, and the arm's own overrides."""
    return {
        "experiment": "quickstart_opsd",
        # Here too, so that no arm changes with the quickstart's choice.
        **divergence("0.5", "entry"),
        "parallel.tensor": "1",
        "train.steps": str(STEPS),
        "train.seed": str(seed),
        "evaluation.every": "10",
        "evaluation.at_start": str(arm.evaluates_base).lower(),
        "evaluation.at_end": "true",
        "rollout.save": "false",
        "checkpoint.at_end": "false",
        **arm.overrides,
    }


def divergence(beta: str, mode: str, tau: str = TAU) -> dict[str, str]:
    """The overrides that choose a divergence; all of them stated, so that no default decides."""
    clip = "null" if mode == "none" else tau
    return {"objective.name": "opsd", "objective.beta": beta, "objective.clip_mode": mode, "objective.clip": clip}


def _title(beta: str, mode: str, tau: str = TAU) -> str:
    return f"beta {beta}, " + ("no clip" if mode == "none" else f"{mode}, tau {tau}")


def _arms() -> Iterator[Arm]:
    own = {"objective.name": "sft", "data.response_column": "own"}
    yield Arm("sft_own", "baseline", "SFT on solutions in its own style", own, evaluates_base=True)
    yield Arm("sft_reference", "baseline", "SFT on the references", {"objective.name": "sft"})
    groups = {"rollout.samples_per_problem": "8", "train.problems_per_step": "8"}
    yield Arm("grpo", "baseline", "GRPO, 8 problems x 8 responses", {"objective.name": "grpo", **groups})
    for beta, mode in DIVERGENCES:
        yield Arm(f"opsd_{beta}_{mode}", "opsd", f"OPSD, {_title(beta, mode)}", divergence(beta, mode))
    yield Arm("sampled_token", "variant", "sampled token", {"objective.name": "sampled_token"})
    plain = divergence("0.5", "entry")
    yield Arm("live", "variant", f"OPSD, {_title('0.5', 'entry')}, live teacher", {**plain, "teacher.policy": "live"})
    for decay in ("0.9", "0.99"):
        overrides = {**plain, "teacher.policy": "ema", "teacher.ema_decay": decay}
        yield Arm(f"ema_{decay}", "variant", f"OPSD, {_title('0.5', 'entry')}, EMA teacher, decay {decay}", overrides)
    for control, title in CONTROLS.items():
        for beta, mode in DIVERGENCES:
            overrides = {**divergence(beta, mode), **_CONTROL_OVERRIDES[control]}
            seeds = MAIN_SEEDS if control == "shuffled" and (beta, mode) in LEVEL else ONE_SEED
            name = f"control_{control}_{beta}_{mode}"
            yield Arm(name, f"control_{control}", f"{title}, {_title(beta, mode)}", overrides, seeds)
    for beta, mode in (("0.5", "entry"), ("0", "bregman"), ("0.5", "rescale")):
        for tau in OTHER_TAUS:
            overrides, title = divergence(beta, mode, tau), f"OPSD, {_title(beta, mode, tau)}"
            yield Arm(f"tau_{beta}_{mode}_{tau}", "tau", title, overrides, ONE_SEED)


ARMS: dict[str, Arm] = {arm.name: arm for arm in _arms()}
