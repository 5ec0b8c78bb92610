"""The entry point: ``torchrun --nproc-per-node N -m opsd_megatron.train [experiment=NAME] key=value ...``.

Hydra composes the configuration from ``opsd_megatron/configs`` and the overrides; nothing past this file sees
OmegaConf. Also ``--cfg job`` to print the composed configuration and exit, ``--config-dir DIR`` to add a directory of
own configuration groups, and ``--check WORLD_SIZE`` to validate for a launch of that size without starting anything.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opsd_megatron.config import Config, ParallelConfig
from opsd_megatron.errors import (
    EXIT_BAD_INPUT,
    EXIT_DEFECT,
    EXIT_INTERRUPTED,
    ConfigError,
    Interrupted,
    OpsdError,
)

if TYPE_CHECKING:
    from opsd_megatron.trainer.setup import Inputs

T = TypeVar("T")

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
        return compose(
            "config",
            overrides=[*searched, *(f"{group}={choice}" for group, choice in files.items() if choice is not None)],
            return_hydra_config=True,
        )

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


def parse(arguments: list[str], *, program: str, description: str) -> argparse.Namespace:
    """The command line of ``train`` and ``evaluate``."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, such as model.path=DIR")
    parser.add_argument("--config-dir", help="directory of own configuration groups")
    parser.add_argument("--cfg", choices=["job"], help="print the composed configuration and exit")
    parser.add_argument("--check", type=_positive, metavar="WORLD_SIZE", help="validate for so many processes and exit")
    return parser.parse_intermixed_args(arguments)


def show_config(options: argparse.Namespace) -> None:
    """Print the composed configuration."""
    config = compose_config(options.overrides, options.config_dir)
    print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")


def run(arguments: list[str]) -> None:
    """Train as the command line says.

    Ranks: every rank of the world, with equal arguments.

    Raises:
        OpsdError: Something the user can mend.
    """
    options = parse(arguments, program="opsd_megatron.train", description="Train with on-policy self-distillation.")
    if options.cfg == "job":
        show_config(options)
    elif options.check is not None:
        config, inputs = _prepare(options, options.check)
        from opsd_megatron.models.memory import estimate_memory
        from opsd_megatron.models.stages import describe_stages

        print(f"valid for {options.check} processes")
        if config.parallel.pipeline > 1:
            stages = config.parallel.pipeline, config.parallel.virtual_stages
            print(describe_stages(inputs.spec.num_layers, pp=stages[0], vpp=stages[1]))
        print(estimate_memory(inputs.spec, config, options.check, separate=inputs.separate_teacher))
    else:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        config, inputs = together(
            lambda: _prepare(options, world_size),
            lambda prepared: json.dumps([asdict(prepared[0]), prepared[1].identity]),
            lambda prepared: prepared[0].parallel.timeout_minutes,
            world_size,
        )
        from opsd_megatron.trainer.setup import build_trainer

        build_trainer(config, inputs).run()


def _prepare(options: argparse.Namespace, world_size: int) -> tuple[Config, Inputs]:
    """Compose the configuration and check it and all it names."""
    config = compose_config(options.overrides, options.config_dir)
    config.validate(world_size)
    quieten()
    # Imported late: a bad configuration is reported without waiting for Megatron-Core.
    from opsd_megatron.trainer.setup import check_inputs

    return config, check_inputs(config)


def quieten() -> None:
    """Silence what libraries say of themselves, before they are imported."""
    # Megatron-Core names every optional GPU library that is absent, on every rank, and torch what it deprecates.
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Megatron-Core asks tensors for gradients they do not keep, by way of the CPU stand-ins; nothing reads them.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)


def together(
    prepare: Callable[[], T], fingerprint: Callable[[T], str], timeout_minutes: Callable[[T], int], world_size: int
) -> T:
    """What ``prepare`` returns, on every rank of the job: what is wrong on one node ends the job on all of them.

    Ranks: every rank of the world.

    Args:
        prepare: Reads and checks a rank's inputs; not collective.
        fingerprint: A digest of these, which must be the same everywhere.
        timeout_minutes: How long ranks wait for one another (``ParallelConfig.timeout_minutes``).
        world_size: Ranks of the job.

    Raises:
        OpsdError: What ``prepare`` raised on any rank, or the ranks' inputs differ.
    """
    problem: OpsdError | None = None
    prepared: T | None = None
    try:
        prepared = prepare()
    except OpsdError as error:
        problem = error
    if world_size > 1:
        from opsd_megatron.distributed.agreement import agree
        from opsd_megatron.distributed.parallel import join_world

        # A rank that could not read its own settings reports that under the default limit.
        join_world(ParallelConfig().timeout_minutes if prepared is None else timeout_minutes(prepared))
        agree(problem, "" if prepared is None else fingerprint(prepared))
    if problem is not None:
        raise problem
    assert prepared is not None
    return prepared


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of processes")
    return value


def exit_status(program: Callable[[list[str]], None]) -> int:
    """Run a program on the command line's arguments.

    Returns:
        0; ``EXIT_INTERRUPTED`` for a run that was told to stop; with one line on stderr ``EXIT_BAD_INPUT`` for any
        other :class:`OpsdError`, and ``EXIT_DEFECT`` where the device's memory ran out; with a traceback
        ``EXIT_DEFECT`` for any other exception.
    """
    rank = int(os.environ.get("RANK", "0"))
    # Read by torch when it first allocates: large tensors on the host get huge pages, where the kernel has them. It
    # would hand out small ones and zero them one by one, which takes longer than some of the arithmetic.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        program(sys.argv[1:])
    except Interrupted:
        return EXIT_INTERRUPTED  # it has been said, while no rank had ended yet
    except OpsdError as error:
        if rank != 0:
            # Most errors are the same on every rank. Rank 0 reports; torchrun then ends the others within this time,
            # so that a rank speaks only where rank 0 had nothing to say.
            time.sleep(10)
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    except Exception as error:
        # Said here and not by the interpreter, whose own ending may never come: see leave().
        if _is_out_of_memory(error):
            print(f"error on rank {rank}: {_out_of_memory(error)}", file=sys.stderr, flush=True)
        else:
            print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, end="", flush=True)
        return EXIT_DEFECT
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # where it was never imported, it ran out of nothing
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _out_of_memory(error: Exception) -> str:
    """What is missing, in one line, and the keys that help, those first that change least (docs/multinode.md)."""
    what = " ".join(str(error).split()).partition(" See documentation")[0]
    return (
        f"{what} Lower train.tokens_per_micro_batch, then rollout.memory_fraction; train.offload=true, "
        "model.recompute=selective or full, a larger parallel.tensor or parallel.context, and teacher.policy=live save "
        "more (docs/multinode.md)"
    )


def leave(status: int) -> None:
    """End the process where ``status`` is an error."""
    if status:
        # At once: the engine's and the process groups' own endings wait for ranks that may have given up as well.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> int:
    """Train, and return the exit status."""
    return exit_status(run)


if __name__ == "__main__":
    leave(main())
