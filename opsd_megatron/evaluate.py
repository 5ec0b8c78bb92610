"""Evaluate a model, or compare two evaluations.

    torchrun --nproc-per-node N -m opsd_megatron.evaluate model.path=HF_DIR_OR_HUB_NAME \\
        evaluation.sets=[aime24,mine@FILE] output_dir=DIR
    torchrun --nproc-per-node N -m opsd_megatron.evaluate model.checkpoint=RUN/checkpoints/step_100 ...
    python -m opsd_megatron.evaluate compare DIR_OR_FILE DIR_OR_FILE

The keys are those of ``opsd_megatron.train``, so ``experiment=NAME`` evaluates as that experiment would; replicas of
``rollout.tensor`` ranks share the problems. Also ``--cfg job``, ``--config-dir DIR`` and ``--check WORLD_SIZE``, as
there.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from opsd_megatron.config.compose import compose_config
from opsd_megatron.train import exit_status, leave, parse, quieten, show_config, together

if TYPE_CHECKING:
    from opsd_megatron.evaluation.stand_alone import StandAlone


def run(arguments: list[str]) -> None:
    """Evaluate or compare, as the command line says.

    Ranks: every rank of the world, with equal arguments.

    Raises:
        OpsdError: Something the user can mend.
    """
    if arguments[:1] == ["compare"]:
        _compare(arguments[1:])
        return
    options = parse(arguments, program="opsd_megatron.evaluate", description="Evaluate a model.")
    if options.cfg == "job":
        show_config(options)
    elif options.check is not None:
        print(f"valid for {options.check} processes", *_prepare(options, options.check).describe(), sep="\n")
    else:
        _evaluate(options, int(os.environ.get("WORLD_SIZE", "1")))


def _prepare(options: argparse.Namespace, world_size: int) -> StandAlone:
    """Compose the configuration and check it and all it names."""
    config = compose_config(options.overrides, options.config_dir)
    config.validate_stand_alone(world_size)
    quieten()
    # Imported late: a bad configuration is reported without waiting for Megatron-Core.
    from opsd_megatron.evaluation.stand_alone import StandAlone
    from opsd_megatron.trainer.setup import check_writable

    check_writable(Path(config.output_dir))
    return StandAlone.check(config)


def _evaluate(options: argparse.Namespace, world_size: int) -> None:
    evaluation = together(
        lambda: _prepare(options, world_size),
        lambda prepared: prepared.fingerprint,
        lambda prepared: prepared.config.parallel.timeout_minutes,
        world_size,
    )
    from opsd_megatron.distributed.parallel import join_world

    join_world(evaluation.config.parallel.timeout_minutes)
    evaluation.run(lambda line: print(line, flush=True))


def _compare(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="opsd_megatron.evaluate compare",
        description="Compare two evaluations of the same problems, problem by problem: the second less the first.",
    )
    for which in ("first", "second"):
        parser.add_argument(which, type=Path, help="output_dir of an evaluation, or one file of records")
    parser.add_argument("--seed", type=int, default=0, help="seeds the bootstrap (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    from opsd_megatron.evaluation.compare import compare_paths, table

    comparisons = compare_paths(options.first, options.second, seed=options.seed)
    if options.json:
        print(json.dumps({name: comparison.as_dict() for name, comparison in comparisons.items()}, indent=2))
        return
    for name, comparison in comparisons.items():
        print(name, *table(comparison), sep="\n")


def main() -> int:
    """Evaluate or compare, and return the exit status."""
    return exit_status(run)


if __name__ == "__main__":
    leave(main())
