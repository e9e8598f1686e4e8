"""Evaluation of checkpoints: `python -m train.evaluate RUN --suite yamls/suites/gauntlet.yaml --data FOLDER`.

A suite of in-context learning tasks (the Gauntlet), lm-eval tasks on the exported model, key-value retrieval
by depth and length, bits per byte of each domain. Results go into the run's folder and its report.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from train.evaluate.suite import load_suite, select
from train.evaluate.task_files import missing_files, require_files
from train.hf.average_option import add_average
from train.recipe.errors import UserError
from train.record import log
from train.record.command import Figures, at_least, command

LENGTHS = "128,256,512"
DEPTHS = "0,0.25,0.5,0.75,1"

logger = log.get_logger("train.evaluate")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "source", type=Path, nargs="+", help="runs/NAME, a checkpoint, an imported or a Hugging Face folder"
    )
    parser.add_argument(
        "--checkpoint", help="a run's checkpoint, batch-... (default: the newest complete one)"
    )
    add_average(parser)
    _add_suite_arguments(parser)
    _add_harness_arguments(parser)
    _add_retrieval_arguments(parser)
    parser.add_argument(
        "--bits-per-byte",
        action="store_true",
        help="bits per byte on the validation set of each domain of a run's shards",
    )
    parser.add_argument(
        "--questions",
        type=at_least(int, 1),
        metavar="N",
        help="only the first N questions per task (default: all)",
    )
    parser.add_argument(
        "--sequences", type=at_least(int, 1), default=8, help="sequences per forward pass (default: 8)"
    )
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="type of matrix products (default: fp32)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available; not yet run on a GPU)")


def _add_suite_arguments(parser: ArgumentParser) -> None:
    suite = parser.add_argument_group("task suite")
    suite.add_argument("--suite", type=Path, help="suite file, for example yamls/suites/gauntlet.yaml")
    suite.add_argument("--data", type=Path, help="folder of the suite's task files")
    suite.add_argument(
        "--task",
        action="append",
        default=[],
        help="only this task; repeatable. Incomplete categories get no score",
    )
    suite.add_argument(
        "--available",
        action="store_true",
        help="only tasks whose file exists; incomplete categories get no score",
    )
    suite.add_argument(
        "--answers", type=Path, metavar="FILE", help="write the answer to each question as JSON lines"
    )


def _add_harness_arguments(parser: ArgumentParser) -> None:
    harness = parser.add_argument_group("lm-eval, on the exported model")
    harness.add_argument(
        "--harness",
        metavar="TASKS",
        help="comma-separated names, or a file such as yamls/suites/open-llm-leaderboard.yaml",
    )
    harness.add_argument(
        "--harness-data",
        type=Path,
        metavar="DIR",
        help="local datasets, OWNER/NAME/CONFIG/SPLIT.jsonl; no network",
    )
    harness.add_argument(
        "--harness-tasks", type=Path, metavar="DIR", help="your own task files, in lm-eval's format"
    )


def _add_retrieval_arguments(parser: ArgumentParser) -> None:
    retrieval = parser.add_argument_group("key-value retrieval")
    retrieval.add_argument("--retrieval", action="store_true", help="accuracy at each depth and length")
    retrieval.add_argument(
        "--lengths",
        type=_numbers(int),
        default=LENGTHS,
        help=f"prompt lengths in tokens (default: {LENGTHS})",
    )
    retrieval.add_argument(
        "--depths", type=_numbers(float), default=DEPTHS, help=f"depths in [0, 1] (default: {DEPTHS})"
    )
    retrieval.add_argument(
        "--trials", type=at_least(int, 1), default=10, help="prompts per cell (default: 10)"
    )


@command(
    "python -m train.evaluate",
    "Evaluates models: task suites, lm-eval, key-value retrieval, bits per byte.",
    add_arguments,
    json="also write all results as JSON",
    name="evaluate",
)
def main(options: Namespace) -> Figures:
    """Evaluates each model given."""
    if not (options.suite or options.harness or options.retrieval or options.bits_per_byte):
        raise UserError("nothing to do; give --suite, --harness, --retrieval or --bits-per-byte")
    if options.suite:
        options.task = tasks_of(options)
    logger.info("evaluate: importing torch and LLM Foundry first")
    from train.evaluate.evaluation import evaluate_source

    log.quiet_libraries()
    return Figures([{"source": str(source), **evaluate_source(source, options)} for source in options.source])


def tasks_of(options: Namespace) -> list[str]:
    """Returns the names of the suite's tasks to run, all of whose files exist.

    Raises:
        UserError: if a task is unknown or a file is missing.
    """
    if not options.data:
        raise UserError("--suite needs --data, the folder of its task files")
    suite = load_suite(options.suite)
    names = select(suite, options.task)
    if options.available:
        lacking = missing_files(suite, names, options.data)
        logger.info(f"evaluate: tasks without a file: {', '.join(lacking) or 'none'}")
        names = [name for name in names if name not in lacking]
    require_files(suite, names, options.data)
    return names


def _numbers(kind: type) -> "type[list[float]]":
    def parse_list(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    return parse_list  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
