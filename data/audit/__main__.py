"""Audits a run's data and looks up its documents: ``python -m data.audit RUN``."""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from textwrap import indent

from data.audit.lookup import SequenceText, Trace, documents_of_step, steps_of_document, texts_of_step
from data.audit.proof import Proof, prove
from data.audit.run_data import RunData
from data.explore.__main__ import PAGE_FILE
from data.explore.__main__ import main as explore
from train.recipe.errors import UserError
from train.record.command import Figures, command
from train.record.tables import text_table


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("folder", help="folder of a run, runs/NAME")
    ask = parser.add_mutually_exclusive_group()
    ask.add_argument("--step", type=int, metavar="N", help="list the documents that step N trained on")
    ask.add_argument("--document", metavar="NAME", help="list the steps that trained on a document")
    parser.add_argument(
        "--text",
        action="store_true",
        help="with --step: print what the model read, documents cut in three as they were",
    )
    parser.add_argument(
        "--read-steps",
        type=int,
        metavar="N",
        help="compare the tokens of N evenly spread steps (default: all)",
    )


@command(
    "python -m data.audit",
    "Proves from a run's data log, plan and shards that nothing was read twice, and nothing skipped except "
    "excluded ranges. `python -m data.explore SHARDS` shows the contents of shards.",
    add_arguments,
    json="also write the results there",
    mistakes=(OSError,),
)
def main(options: Namespace) -> Figures:
    """Audits a run's data log, or lists a step's documents or a document's steps; status 1 on violations."""
    if options.text and options.step is None:
        raise UserError("needs a step", key="--text", remedy="give --step N")
    data = RunData(Path(options.folder))
    if options.text:
        texts = texts_of_step(data, options.step)
        print(describe_texts(texts))
        return Figures([asdict(text) for text in texts])
    if options.step is None and options.document is None:
        proof = prove(data, options.read_steps, progress=sys.stderr.isatty())
        print(describe_proof(proof, data))
        return Figures(asdict(proof), status=0 if proof.holds else 1)
    sights = (
        documents_of_step(data, options.step)
        if options.step is not None
        else steps_of_document(data, options.document)
    )
    print(describe_sights(sights))
    return Figures([asdict(sight) for sight in sights])


def run(arguments: list[str]) -> int:
    """Runs the command line; ``SHARDS --html [FILE]``, of the previous release, is now ``data.explore``."""
    if not any(argument.split("=")[0] == "--html" for argument in arguments):
        return main(arguments)
    print("python -m data.audit SHARDS --html is now called python -m data.explore SHARDS", file=sys.stderr)
    given = [*arguments]
    if "--html" in given:
        after = given.index("--html") + 1
        if after == len(given) or given[after].startswith("--"):
            given.insert(after, PAGE_FILE)
    return explore(given)


def describe_proof(proof: Proof, data: RunData) -> str:
    """Describes the proof in lines."""
    lines = [f"{data.folder}: {proof.steps:,} steps, {proof.positions:,} samples"]
    consumed = [
        (name, f"{samples:,} samples", f"{epochs:.3f} epochs")
        for name, (samples, epochs) in proof.consumed.items()
    ]
    lines.append(indent(text_table((), consumed, "<>>"), "  "))
    lines += [f"  excluded: {declared}" for declared in proof.declared]
    lines += [f"  VIOLATION {violation}" for violation in proof.faults]
    if proof.holds:
        what = "nothing else was skipped and nothing" if proof.declared else "nothing was skipped or"
        lines.append(f"{what} read twice; the tokens of {proof.steps_read:,} steps match the shards")
    return "\n".join(lines)


def describe_texts(texts: list[SequenceText]) -> str:
    """Describes sequences: position and domain, and each document's text."""
    return "\n".join(
        f"position {it.position}, {it.domain}, document {number} of {len(it.documents)}\n{indent(text, '  ')}"
        for it in texts
        for number, text in enumerate(it.documents, 1)
    )


def describe_sights(sights: list[Trace]) -> str:
    """Describes the sights as a table."""
    if not sights:
        return "no step trained on it"
    heads = ("step", "position", "domain", "sample", "epoch", "tokens", "document")
    rows = [(s.step, s.position, s.domain, s.sample, s.epoch, s.tokens, s.document) for s in sights]
    return text_table(heads, rows, ">><>>><")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
