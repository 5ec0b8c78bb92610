"""Every rule of the configuration, every shipped configuration, and what a user is told about a wrong one."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from opsd_megatron.config import Config, LoraConfig
from opsd_megatron.config.compose import compose_config
from opsd_megatron.config.rules import CHOICES
from opsd_megatron.errors import EXIT_BAD_INPUT, ConfigError
from opsd_megatron.train import main

REQUIRED = ["model.path=m", "data.train=t", "output_dir=o"]
CONFIGS = Path(__file__).parents[2] / "opsd_megatron/configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_shipped_experiment_composes_and_validates(experiment: str) -> None:
    config = compose_config([f"experiment={experiment}", *REQUIRED, "data.eval=e"])
    config.validate(world_size=config.parallel.tensor * config.parallel.pipeline * 4)


@pytest.mark.parametrize("group", ["objective", "teacher", "rollout"])
def test_every_group_choice_composes(group: str) -> None:
    choices = [path.stem for path in (CONFIGS / group).glob("*.yaml")]
    assert len(choices) > 1
    for choice in choices:
        # The script is read only by the scripted engine; any file will do for the rules of the configuration.
        compose_config([f"{group}={choice}", f"rollout.script={__file__}", *REQUIRED]).validate(world_size=1)


def test_defaults_come_from_the_dataclasses() -> None:
    config = compose_config(REQUIRED)
    config.model.path = config.data.train = config.output_dir = ""
    assert config == Config()


def test_choices_name_existing_keys() -> None:
    assert all(Config().get(key) in allowed for key, allowed in CHOICES.items())


def test_every_attribute_is_documented() -> None:
    for group in fields(Config):
        node = getattr(Config(), group.name)
        if is_dataclass(node):
            missing = [key.name for key in fields(node) if f"        {key.name}: " not in (type(node).__doc__ or "")]
            assert not missing, f"{group.name}: {missing}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.pth=x"], "unknown key model.pth; did you mean model.path"),
        (["+extra.key=1"], "unknown key extra"),
        (["objektive=sft"], "unknown key objektive; did you mean objective"),
        (["experiment=nope"], "experiment/nope"),
        (["parallel.tensor=two"], "parallel.tensor=two"),
    ],
)
def test_composition_errors_name_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config(overrides)


@pytest.mark.parametrize(
    ("override", "world_size", "message"),
    [
        ("model.path=''", 1, "model.path is not set"),
        ("objective.name=opds", 1, "objective.name='opds' is not one of opsd, sampled_token, sft, grpo"),
        ("objective.name=grpo", 1, "rollout.samples_per_problem=1 leaves nothing to compare; use at least 2"),
        ("train.updates_per_step=2", 1, "objective.name=opsd has no ratio .* lower train.problems_per_step"),
        ("objective.importance_cap=0.5", 1, "objective.importance_cap=0.5 must be at least 1"),
        ("objective.ratio_clip_low=1.5", 1, "objective.ratio_clip_low=1.5 must be at least 0 and at most 1"),
        ("lora.rank=-1", 1, "lora.rank=-1 must be at least 1, or 0"),
        ("lora.alpha=0", 1, "lora.alpha=0.0 must be above 0"),
        ("lora.alpha=inf", 1, "lora.alpha=inf must be above 0"),
        ("lora.targets=[q_proj,qkv]", 1, "lora.targets: 'qkv' is not one of q_proj, k_proj"),
        ("lora.targets=[q_proj,q_proj]", 1, r"lora.targets=\[q_proj,q_proj\] names a projection twice"),
        ("objective.beta=1.5", 1, "objective.beta=1.5 must be at least 0 and at most 1"),
        ("objective.clip=0", 1, "objective.clip=0.0 must be above 0"),
        ("objective.beta=1e-9", 1, "use 0 for forward KL"),
        ("objective.beta=nan", 1, "not a finite number"),
        ("rollout.top_k=0", 1, "rollout.top_k=0 must be -1"),
        ("optimizer.beta2=1.0", 1, "optimizer.beta2"),
        ("parallel.expert=0", 1, "parallel.expert=0 must be at least 1"),
        ("parallel.tensor=2", 3, "world size 3 is not a multiple"),
        ("parallel.sequence=true", 1, "parallel.sequence"),
        (
            "parallel.context=2",
            3,
            r"parallel.tensor \* parallel.pipeline \* parallel.context = 1 \* 1 \* 2; start a mul",
        ),
        ("parallel.virtual_stages=2", 1, "parallel.virtual_stages=2 .* needs parallel.pipeline > 1"),
        (
            "parallel.expert=2",
            3,
            "parallel.expert=2 . parallel.expert_tensor=1 does not divide the 3 ranks of a pipeline",
        ),
        ("rollout.tensor=2", 3, "rollout.tensor=2 does not divide the world size 3; choose .* rollout.tensor=1"),
        ("rollout.engine=scripted", 1, "rollout.script"),
        ("optimizer.min_lr=1", 1, "optimizer.min_lr"),
        ("evaluation.every=5", 1, "data.eval"),
        ("data.student_template=/nowhere/t.txt", 1, "data.student_template=/nowhere/t.txt is not a file"),
        ("data.analysis_template=/nowhere/t.txt", 1, "data.analysis_template=/nowhere/t.txt is not a file"),
        (
            "data.privileged=oracle",
            1,
            "data.privileged='oracle' is not one of reference, answer, siblings, none, shuff",
        ),
        ("data.privileged=siblings", 1, "data.privileged=siblings .* rollout.samples_per_problem=1 must be at least 2"),
        ("data.boundary=teacher", 1, "data.boundary='teacher' is not one of own, student"),
        ("data.analysis_max_tokens=0", 1, "data.analysis_max_tokens=0 must be at least 1"),
    ],
)
def test_validation_names_key_and_remedy(override: str, world_size: int, message: str) -> None:
    config = compose_config([*REQUIRED, override])
    with pytest.raises(ConfigError, match=message):
        config.validate(world_size)


def test_siblings_leave_out_what_groups_are_compared_by() -> None:
    overrides = [*REQUIRED, "data.privileged=siblings", "rollout.samples_per_problem=4"]
    compose_config(overrides).validate(1)
    with pytest.raises(ConfigError, match=r"data\.privileged=siblings .*objective\.name=opsd_grpo"):
        compose_config([*overrides, "objective=opsd_grpo"]).validate(1)


def test_an_analysis_needs_something_to_analyse() -> None:
    overrides = [*REQUIRED, "data.privileged=none", "data.analyse_first=true"]
    with pytest.raises(ConfigError, match=r"data\.privileged=none shows it nothing"):
        compose_config(overrides).validate(1)


def test_adapters_of_nothing_are_refused() -> None:
    config = compose_config([*REQUIRED, "lora.rank=4", "lora.targets=[]"])
    with pytest.raises(ConfigError, match=r"lora\.targets is empty; name some of q_proj"):
        config.validate(1)


def test_adapters_have_one_form() -> None:
    config = compose_config([*REQUIRED, "lora.rank=4", "lora.targets=[v_proj,q_proj]"])
    config.validate(1)
    assert config.lora.resolved() == LoraConfig(4, 8.0, ["q_proj", "v_proj"]) and config.lora.scale == 2.0
    assert LoraConfig(3, 7.0).resolved().scale == LoraConfig(3, 7.0).scale == 7 / 3


def test_warm_up_must_end_before_the_decay() -> None:
    config = compose_config([*REQUIRED, "optimizer.schedule=cosine", "optimizer.warmup_steps=100"])
    with pytest.raises(ConfigError, match="warmup_steps=100 leaves no step"):
        config.validate(1)


def test_own_configuration_directory(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment/mine.yaml"
    mine.write_text("# @package _global_\ntrain: {steps: 7}\nobjective: {name: opsd}\n")
    assert compose_config(["experiment=mine"], str(tmp_path)).train.steps == 7
    message = (
        "objective=grpo has objective.name=grpo, and mine puts opsd in its place; pass objective.name=grpo as well"
    )
    with pytest.raises(ConfigError, match=message):
        compose_config(["experiment=mine", "objective=grpo"], str(tmp_path))
    with pytest.raises(ConfigError, match="is not a directory"):
        compose_config([], str(tmp_path / "absent"))


def test_a_run_is_repeated_from_its_saved_configuration(tmp_path: Path) -> None:
    """As docs/recipes.md says; and what one is told who forgets the first line."""
    done = compose_config(["experiment=qwen3_8b_grpo", "train.steps=7", "data.eval=e"])
    again = tmp_path / "experiment/again.yaml"
    again.parent.mkdir()
    again.write_text(yaml.safe_dump(asdict(done)))
    with pytest.raises(ConfigError, match=r"unknown key experiment: a file for experiment= .* '# @package _global_'"):
        compose_config(["experiment=again"], str(tmp_path))
    again.write_text("# @package _global_\n" + again.read_text())
    assert compose_config(["experiment=again"], str(tmp_path)) == done
    assert compose_config(["experiment=again", "train.steps=9"], str(tmp_path)).train.steps == 9


def test_main_prints_one_line_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train", "model.pth=x"])
    assert main() == EXIT_BAD_INPUT
    printed = capsys.readouterr()
    assert printed.err == "error: unknown key model.pth; did you mean model.path?\n"
    assert printed.out == ""


def test_cfg_job_prints_the_composed_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--cfg", "job", "train.steps=3"])
    assert main() == 0
    assert "steps: 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective=opsd_grpo", "train.updates_per_step=2"],
            "objective.name=opsd_grpo has no ratio on all of its loss",
        ),
        (
            [
                "objective=grpo",
                "rollout.samples_per_problem=2",
                "train.problems_per_step=1",
                "train.updates_per_step=3",
            ],
            "train.updates_per_step=3 is above the 2 rollouts of a step",
        ),
    ],
)
def test_objectives_refuse_what_they_cannot_use(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config([*REQUIRED, *overrides]).validate(1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=sft", "objective.importance_cap=2"], "importance_cap=2.0 does nothing .* leave it at null"),
        (["objective=sampled_token", "objective.entropy_gate=1"], "a divergence .objective.name opsd or opsd_grpo.;"),
        (["objective=sampled_token", "objective.top_k=5"], "objective.top_k=5 does nothing with .*=sampled_token"),
        (["objective=grpo", "objective.top_k=5"], "objective.top_k=5 does nothing with objective.name=grpo"),
        (["objective=grpo", "objective.log_ratio_clip=1"], "log_ratio_clip=1.0 .* needs objective.name=sampled_token"),
        (["objective=grpo", "objective.grpo_weight=2"], "grpo_weight=2.0 .* needs objective.name=opsd_grpo; .* at 1.0"),
        (
            ["objective=grpo", "objective.ratio_clip_high=0.28"],
            "high=0.28 .* needs train.updates_per_step above 1; .*0.2",
        ),
        (["objective=opsd_grpo", "objective.ratio_clip_low=0.1"], "low=0.1 .* needs train.updates_per_step above 1"),
        (["objective.top_k_side=student"], "top_k_side=student .* needs objective.top_k; leave it at teacher"),
        (["objective.entropy_gate_keep=high"], "entropy_gate_keep=high .* needs objective.entropy_gate; .* at low"),
        (["objective.position_width=0.2"], "position_width=0.2 .* needs objective.position_floor; leave it at 0.1"),
        (["teacher=live", "teacher.ema_decay=0.9"], "teacher.ema_decay=0.9 .* needs teacher.policy=ema; .* at 0.99"),
        (["data.analysis_max_tokens=9"], "data.analysis_max_tokens=9 .* needs data.analyse_first=true"),
        (["objective.advantage_std=false"], "advantage_std=false .* needs groups .*; leave it at true"),
        (["objective=grpo", "teacher=ema"], "teacher.policy=ema .* needs a teacher .*; leave it at frozen"),
        (["objective=sft", "data.privileged=siblings"], "data.privileged=siblings .* needs a teacher"),
        (["objective=grpo", "data.analyse_first=true"], "data.analyse_first=true .* needs a teacher .* at false"),
        (["data.teach_correct=true"], "data.teach_correct=true .* needs data.privileged=siblings; leave it at false"),
        (["data.sibling_thoughts=true"], "data.sibling_thoughts=true .* needs data.privileged=siblings"),
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config([*REQUIRED, *overrides]).validate(1)


def test_the_ratios_bounds_are_for_several_updates() -> None:
    several = ["objective=grpo", "rollout.samples_per_problem=4", "train.updates_per_step=2"]
    compose_config([*REQUIRED, *several, "objective.ratio_clip_high=0.28"]).validate(1)


@pytest.mark.parametrize("objective", ["sft", "grpo", "sampled_token", "opsd_grpo"])
def test_an_objective_may_be_chosen_on_top_of_a_recipe(objective: str) -> None:
    config = compose_config([*REQUIRED, "recipe=opsd", f"objective={objective}"])
    config.validate(1)
    assert config.objective.name == objective
    assert config.rollout.samples_per_problem == (8 if config.needs.groups else 1)
    assert config.objective.importance_cap == (2.0 if config.needs.groups else None)
    assert (config.objective.beta, config.rollout.temperature) == (0.0, 1.1)  # what else the recipe says stays


GROUPS = ("objective", "teacher", "rollout", "evaluation")


def choices_of(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def values_of(group: str, choice: str) -> dict[str, Any]:
    """What a file of ``configs/`` says, by dotted key, without what it is made of."""
    text = (CONFIGS / group / f"{choice}.yaml").read_text()
    values = yaml.safe_load(text)
    values.pop("defaults", None)
    return leaves(values, "" if text.startswith("# @package _global_") else f"{group}.")


def test_no_file_holds_what_is_chosen_by_a_group() -> None:
    """A value of an experiment's own replaces the group's that was chosen beside it: it would be chosen in vain."""
    chosen = {key for group in GROUPS for choice in choices_of(group) for key in values_of(group, choice)}
    assert {"objective.name", "objective.importance_cap", "rollout.samples_per_problem", "teacher.policy"} <= chosen
    held = {
        (choice, key)
        for group in ("recipe", "size", "experiment")
        for choice in choices_of(group)
        for key in values_of(group, choice).keys() & chosen
    }
    assert held == {("quickstart_opsd", f"evaluation.{key}") for key in ("samples_per_problem", "temperature")}


SOURCES = [f"recipe={name}" for name in choices_of("recipe") if name != "common"]
SOURCES += [
    f"experiment={name}" for name in ("quickstart_opsd", "quickstart_sft", "qwen3_8b_grpo", "qwen3_8b_opsd_full")
]


@pytest.mark.parametrize(("number", "source"), enumerate(SOURCES))
def test_groups_chosen_beside_a_recipe_or_experiment_are_in_effect(number: int, source: str) -> None:
    """With an error where they are not, which says what to pass."""
    chosen = {group: choices_of(group)[number % len(choices_of(group))] for group in GROUPS}
    overrides = [source, *(f"{group}={choice}" for group, choice in chosen.items())]
    try:
        config = compose_config(overrides)
    except ConfigError as error:
        remedy = re.fullmatch(r"(.*) has (\S+)=.* in its place; pass (\2=\S+) as well, or \2=\S+ if .*", str(error))
        assert remedy is not None and remedy[1] in overrides and source == "experiment=quickstart_opsd"
        config = compose_config([*overrides, remedy[3]])
    for group, choice in chosen.items():
        wanted = values_of(group, choice)
        assert {key: config.get(key) for key in wanted} == wanted


def test_every_file_can_be_refused() -> None:
    """What a user's own files hold, and a recipe that an experiment refines for another one."""
    with pytest.raises(
        ConfigError, match=r"opsd_nonthinking has objective.clip=1e-06, and qwen3_8b_opsd puts 0.06 in "
    ):
        compose_config(["experiment=qwen3_8b_opsd", "recipe=opsd_nonthinking"])
    stated = compose_config(["experiment=qwen3_8b_opsd", "recipe=opsd_nonthinking", "objective.clip=1e-7"])
    assert stated.objective.clip == 1e-7 and not stated.data.teacher_thinking
    assert compose_config(["experiment=qwen3_8b_opsd", "recipe=opsd"]).objective.clip == 0.06
    with pytest.raises(ConfigError, match="~GROUP leaves it out"):
        compose_config(["evaluation=null"])


def test_keys_on_the_command_line_win_over_groups_there() -> None:
    config = compose_config(["recipe=opsd", "objective=grpo", "rollout.samples_per_problem=4", "teacher.policy=live"])
    assert (config.objective.name, config.rollout.samples_per_problem, config.teacher.policy) == ("grpo", 4, "live")


def test_the_recipe_weighs_as_the_objective_does() -> None:
    caps = [
        compose_config([*REQUIRED, choice]).objective.importance_cap for choice in ("recipe=grpo", "objective=grpo")
    ]
    assert caps == [2.0, 2.0]
