"""Hydra's part: from overrides and the files of ``opsd_megatron/configs`` to the dataclasses of this package.

Nothing past this file sees OmegaConf. Not imported by the package itself, since Hydra is not needed to use it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opsd_megatron.config import Config
from opsd_megatron.errors import ConfigError

# What a file can be chosen for: first whole configurations, then single groups of it.
_FILES = ("experiment", "recipe", "size")
_GROUPS = ("objective", "teacher", "rollout", "evaluation")


def compose_config(overrides: list[str], config_dir: str | None = None) -> Config:
    """Compose and type-check a configuration.

    Args:
        overrides: Hydra overrides, ``key=value``.
        config_dir: Directory of own configuration groups, searched before the packaged ones.

    Raises:
        ConfigError: A key is unknown, a group or file does not exist, or a value has the wrong type; or a file chosen
            among ``overrides`` has a value that another file, chosen too, replaces.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    if config_dir is not None:
        directory = Path(config_dir).resolve()
        if not directory.is_dir():
            raise ConfigError(f"--config-dir {config_dir} is not a directory")
        overrides = [*overrides, f"hydra.searchpath=[file://{directory}]"]
    try:
        with initialize_config_module("opsd_megatron.configs", version_base="1.3"):
            tree = compose("config", overrides=overrides, return_hydra_config=True)
            choices = {name: str(choice) for name, choice in tree.hydra.runtime.choices.items() if choice}
            del tree.hydra
            _check_chosen(tree, overrides, choices)
        # Merged into the schema again, since Hydra lets "+key=value" add keys that the schema does not know.
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(tree)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    except ValueError as error:  # null for a group
        raise ConfigError(f"a group takes the name of one of its files, ~GROUP leaves it out: {error}") from error
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """The configuration as a file for ``--config-dir``, but for its first line, or to read."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _check_chosen(tree: DictConfig, overrides: list[str], choices: dict[str, str]) -> None:
    """Check that every value of a file chosen on the command line is in effect, or another was stated there by key.

    Without this a recipe that holds ``objective.name`` as a value would train by it, whatever ``objective=`` says.

    Args:
        tree: The composed configuration; Hydra is still initialised.
        overrides: What it was composed from.
        choices: The files that were chosen, by group.

    Raises:
        ConfigError: Names the choice, the key, both values and what to pass.
    """
    parsed = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(overrides)}
    chosen = {group: choices[group] for group in (*_FILES, *_GROUPS) if group in choices and group in parsed}
    stated = parsed.keys() - chosen.keys()
    searched = [one for one in overrides if one.startswith("hydra.")]
    for group, choice in chosen.items():
        if group in _GROUPS:
            own = compose(f"{group}/{choice}", overrides=searched)
            _compare(tree, own, _leaves(own), stated, (group, choice), [choices.get(name) for name in _FILES])
    if "recipe" in chosen and "experiment" in chosen:
        _check_recipe(tree, searched, chosen, stated, size=choices.get("size"))


def _check_recipe(
    tree: DictConfig, searched: list[str], chosen: dict[str, str], stated: set[str], *, size: str | None
) -> None:
    """The same for a recipe put in the place of an experiment's own, against what the experiment holds itself."""

    def composed(**files: str | None) -> DictConfig:
        chosen = [f"{group}={choice}" for group, choice in files.items() if choice is not None]
        tree: DictConfig = compose("config", overrides=[*searched, *chosen], return_hydra_config=True)
        return tree

    recipe, experiment = chosen["recipe"], chosen["experiment"]
    if composed(experiment=experiment).hydra.runtime.choices.recipe == recipe:
        return  # the experiment refines what it was made of
    groups = {group: choice for group, choice in chosen.items() if group in _GROUPS}
    without, alone = composed(**groups), composed(**groups, recipe=recipe)
    del without.hydra, alone.hydra
    keys = [key for key in _leaves(alone) if OmegaConf.select(alone, key) != OmegaConf.select(without, key)]
    # A size is meant to refine recipes.
    _compare(tree, composed(**groups, recipe=recipe, size=size), keys, stated, ("recipe", recipe), [experiment])


def _compare(
    tree: DictConfig,
    own: DictConfig,
    keys: list[str],
    stated: set[str],
    choice: tuple[str, str],
    others: list[str | None],
) -> None:
    """Refuse values at ``keys`` that are not those of ``own``, the file that was chosen, nor stated by key."""
    for key in keys:
        wanted, found = (OmegaConf.select(one, key) for one in (own, tree))
        if wanted != found and not any(key == one or key.startswith(f"{one}.") for one in stated):
            raise ConfigError(
                f"{'='.join(choice)} has {key}={_shown(wanted)}, and {' or '.join(filter(None, others)) or 'another'} "
                f"puts {_shown(found)} in its place; pass {key}={_shown(wanted)} as well, or {key}={_shown(found)} if "
                "that is meant"
            )


def _shown(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, ListConfig):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _leaves(tree: DictConfig, prefix: str = "") -> list[str]:
    """The keys of ``tree`` that hold values, dotted."""
    keys = []
    for name in tree:
        node = tree._get_node(name)
        keys += _leaves(node, f"{prefix}{name!s}.") if isinstance(node, DictConfig) else [f"{prefix}{name!s}"]
    return keys


def _explain(error: Exception) -> str:
    """Hydra's message in one line, with the nearest known key where one was misspelt."""
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    message = " ".join(" ".join(str(cause).split()) for cause in causes)
    message, _, location = message.partition(" full_key: ")
    unknown = re.search(r"Key '([^']+)' (?:is )?not in|Could not override '([^']+)'", message)
    if unknown is None:
        return message
    key = location.split()[0] if location else unknown.group(1) or unknown.group(2)
    if key in _FILES:
        return (
            f"unknown key {key}: a file for {key}= holds whole configurations, and without the first line "
            f"'# @package _global_' its keys are taken for those of a group {key}; add that line to the file"
        )
    near = difflib.get_close_matches(key, _known_keys(), n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else "all keys: the classes in opsd_megatron/config/"
    return f"unknown key {key}; {remedy}"


def _known_keys() -> list[str]:
    """Every key, and every group that a file can be chosen for."""
    keys = [*_FILES]
    for group in fields(Config):
        node = getattr(Config(), group.name)
        keys.append(group.name)
        keys += [f"{group.name}.{key.name}" for key in fields(node)] if is_dataclass(node) else []
    return keys
