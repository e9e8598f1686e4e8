"""The books of a run, proven and asked: ``python -m data.audit RUN``."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from data.audit.lookup import Sight, documents_of_step, steps_of_document
from data.audit.proof import Proof, prove
from data.audit.run_data import RunBooks
from train.recipe.errors import UserError


def main(arguments: list[str]) -> int:
    """Runs the command line; returns 0 if the books are in order, 1 if not, 2 for a mistake."""
    if any(argument.split("=")[0] == "--html" for argument in arguments):
        return _explore(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m data.audit",
        description="Proves from a run's data log, plan and shards that nothing was skipped, but what was "
        "declared to be, or read twice. What shards hold shows `python -m data.explore SHARDS`.",
    )
    parser.add_argument("folder", help="of a run, runs/NAME")
    ask = parser.add_mutually_exclusive_group()
    ask.add_argument("--step", type=int, metavar="N", help="list the documents that step N saw")
    ask.add_argument("--document", metavar="NAME", help="list the steps that saw a document")
    parser.add_argument(
        "--read-steps", type=int, metavar="N", help="compare the tokens of N steps, evenly spread, not of all"
    )
    parser.add_argument("--json", metavar="FILE", help="write what is found there too")
    options = parser.parse_args(arguments)
    try:
        books = RunBooks(Path(options.folder))
        if options.step is not None or options.document is not None:
            sights = (
                documents_of_step(books, options.step)
                if options.step is not None
                else steps_of_document(books, options.document)
            )
            found: object = [asdict(sight) for sight in sights]
            text, status = describe_sights(sights), 0
        else:
            proof = prove(books, options.read_steps, progress=sys.stderr.isatty())
            found = asdict(proof)
            text, status = describe_proof(proof, books), 0 if proof.holds else 1
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return status


def _explore(arguments: list[str]) -> int:
    """Runs ``data.audit SHARDS --html [FILE]``, the name of the release before, which gave FILE a default."""
    from data.explore.__main__ import PAGE_FILE
    from data.explore.__main__ import main as explore

    print("python -m data.audit SHARDS --html is now called python -m data.explore SHARDS", file=sys.stderr)
    given = [*arguments]
    if "--html" in given:
        after = given.index("--html") + 1
        if after == len(given) or given[after].startswith("--"):
            given.insert(after, PAGE_FILE)
    return explore(given)


def describe_proof(proof: Proof, books: RunBooks) -> str:
    """The proof as lines."""
    lines = [f"{books.folder}: {proof.steps:,} steps, {proof.positions:,} samples"]
    lines += [
        f"  {name:20} {samples:>12,} samples  {epochs:8.3f} epochs"
        for name, (samples, epochs) in proof.consumed.items()
    ]
    lines += [f"  skipped by declaration: {declared}" for declared in proof.declared]
    lines += [f"  FAULT {fault}" for fault in proof.faults]
    if proof.holds:
        what = "nothing else was skipped, nothing" if proof.declared else "nothing was skipped or"
        lines.append(f"{what} read twice; the tokens of {proof.steps_read:,} steps are the shards'")
    return "\n".join(lines)


def describe_sights(sights: list[Sight]) -> str:
    """What was seen as a table."""
    if not sights:
        return "no step saw it"
    lines = [f"{'step':>8}{'position':>12}  {'domain':16}{'sample':>10}{'epoch':>6}{'tokens':>8}  document"]
    lines += [
        f"{s.step:>8}{s.position:>12}  {s.domain:16}{s.sample:>10}{s.epoch:>6}{s.tokens:>8}  {s.document}"
        for s in sights
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
