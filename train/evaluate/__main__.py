"""Evaluates checkpoints: `python -m train.evaluate RUN --suite yamls/suites/gauntlet.yaml --data FOLDER`.

A suite of in-context-learning tasks (the Gauntlet), tasks of lm-eval on the exported model, key-value
retrieval at depth x length, bits per byte of each domain. Results go into the run's folder and its report.
"""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from train.evaluate.suite import load_suite, missing_files, require_files, select
from train.recipe.errors import UserError
from train.record import log
from train.record.command import Figures, command

LENGTHS = "128,256,512"
DEPTHS = "0,0.25,0.5,0.75,1"

logger = log.get_logger("train.evaluate")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "source", type=Path, nargs="+", help="runs/NAME, a checkpoint, an imported or a Hugging Face folder"
    )
    parser.add_argument("--checkpoint", help="of a run: batch-..., instead of the newest whole one")
    suite = parser.add_argument_group("a suite of tasks")
    suite.add_argument("--suite", type=Path, help="for example yamls/suites/gauntlet.yaml")
    suite.add_argument("--data", type=Path, help="folder of its task files")
    suite.add_argument(
        "--task",
        action="append",
        default=[],
        help="only this task; repeatable. Categories must be whole to score",
    )
    suite.add_argument(
        "--available",
        action="store_true",
        help="only tasks whose file is there; broken categories get no score",
    )
    suite.add_argument(
        "--answers", type=Path, metavar="FILE", help="write each question's outcome as JSON lines"
    )
    harness = parser.add_argument_group("lm-eval, on the exported model")
    harness.add_argument(
        "--harness",
        metavar="TASKS",
        help="names with commas, or a file such as yamls/suites/open-llm-leaderboard.yaml",
    )
    harness.add_argument(
        "--harness-data",
        type=Path,
        metavar="DIR",
        help="local datasets, OWNER/NAME/CONFIG/SPLIT.jsonl; no network",
    )
    harness.add_argument(
        "--harness-tasks", type=Path, metavar="DIR", help="task files of your own, lm-eval's form"
    )
    retrieval = parser.add_argument_group("key-value retrieval")
    retrieval.add_argument("--retrieval", action="store_true", help="accuracy at each depth and length")
    retrieval.add_argument(
        "--lengths", type=_numbers(int), default=LENGTHS, help=f"tokens (default: {LENGTHS})"
    )
    retrieval.add_argument("--depths", type=_numbers(float), default=DEPTHS, help=f"default: {DEPTHS}")
    retrieval.add_argument("--trials", type=_positive, default=10, help="prompts per cell (default: 10)")
    parser.add_argument(
        "--bits-per-byte",
        action="store_true",
        help="loss on the validation set of each domain of a run's shards",
    )
    parser.add_argument(
        "--questions", type=_positive, metavar="N", help="per task, the first N (default: all)"
    )
    parser.add_argument("--sequences", type=_positive, default=8, help="of a forward pass (default: 8)")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of matrix products (default: fp32)"
    )
    parser.add_argument(
        "--device", help="cpu or cuda (default: cuda where there is one; not yet run on a GPU)"
    )


@command(
    "python -m train.evaluate",
    "Evaluates models: suites of tasks, lm-eval, key-value retrieval, bits per byte.",
    add_arguments,
    json="write all results as JSON too",
    name="evaluate",
)
def main(options: Namespace) -> Figures:
    """Evaluates each model that is given."""
    if not (options.suite or options.harness or options.retrieval or options.bits_per_byte):
        raise UserError("nothing to do; give --suite, --harness, --retrieval or --bits-per-byte")
    if options.suite:
        options.task = tasks_of(options)
    logger.info("evaluate: importing torch and LLM Foundry first")
    from train.evaluate.evaluation import evaluate_source

    log.quiet_libraries()
    return Figures([{"source": str(source), **evaluate_source(source, options)} for source in options.source])


def tasks_of(options: Namespace) -> list[str]:
    """The names of the suite's tasks to run, whose files are all there.

    Raises:
        UserError: if a task is unknown or a file is missing.
    """
    if not options.data:
        raise UserError("--suite needs --data, the folder of its task files")
    suite = load_suite(options.suite)
    names = select(suite, options.task)
    if options.available:
        lacking = missing_files(suite, names, options.data)
        logger.info(f"evaluate: left out, no file: {', '.join(lacking) or 'none'}")
        names = [name for name in names if name not in lacking]
    require_files(suite, names, options.data)
    return names


def _numbers(kind: type) -> "type[list[float]]":
    def parse_list(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    return parse_list  # type: ignore[return-value]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
