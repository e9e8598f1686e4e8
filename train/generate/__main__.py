"""Continues text: `python -m train.generate runs/NAME "Once upon a time"`.

Several prompts are answered as one batch; one prompt is answered as it is written. Takes a run, a
checkpoint, an imported folder, or a folder in Hugging Face's form.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.generate.chat import END, Message, chatml

if TYPE_CHECKING:
    from train.generate.generation import Answer, Text
    from train.model.decoder import Decoder

USAGE_STATUS = 2


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status (2: a mistake of the user)."""
    options = parse(arguments)
    print(f"generate: loading {options.source}; importing torch first", file=sys.stderr, flush=True)

    from train.recipe.errors import UserError

    try:
        prompts = prompts_of(options)
        decoder, text = load(options)
        answers, seconds = write_answers(decoder, text, prompts, options)
    except (UserError, OSError, ValueError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return USAGE_STATUS
    except KeyboardInterrupt:
        print("\ngenerate: interrupted", file=sys.stderr)
        return 130
    tokens = sum(len(answer.ids) for answer in answers)
    print(
        f"generate: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s; ended by "
        f"{', '.join(sorted({answer.ending for answer in answers}))}",
        file=sys.stderr,
    )
    if options.json:
        rows = [{"prompt": prompt, **asdict(answer)} for prompt, answer in zip(prompts, answers, strict=True)]
        options.json.write_text(json.dumps({"seconds": seconds, "answers": rows}, indent=1) + "\n")
    return 0


def prompts_of(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line, of a file with one per line, or of standard input as a whole.

    Raises:
        ValueError: if there is none.
    """
    prompts = list(options.prompt)
    if options.file:
        prompts += [line for line in options.file.read_text().splitlines() if line.strip()]
    if prompts == ["-"]:
        prompts = [sys.stdin.read()]
    if not prompts:
        raise ValueError("no prompt; give one, or --file, or - for standard input")
    if not options.chat:
        return prompts
    system = [Message("system", options.system)] if options.system else []
    return [chatml([*system, Message("user", prompt)]) for prompt in prompts]


def load(options: argparse.Namespace) -> "tuple[Decoder, Text]":
    """The decoder on its device with its weights, and its tokenizer."""
    import torch

    from train.generate.generation import text_of
    from train.hf.open_decoder import open_decoder

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    decoder, source = open_decoder(options.source, options.checkpoint, options.device, dtype)
    return decoder, text_of(source)


def write_answers(
    decoder: "Decoder", text: "Text", prompts: Sequence[str], options: argparse.Namespace
) -> "tuple[list[Answer], float]":
    """Prints the answers, a single one as it grows, and returns them with the seconds they took."""
    from train.generate.generation import generate
    from train.generate.sampling import Sampling

    sampling = Sampling(
        repetition_penalty=options.repetition_penalty,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
    )
    stop = [*options.stop, *([END] if options.chat else [])]
    begun = time.perf_counter()
    streams = len(prompts) == 1
    shown = 0
    answers: list[Answer] = []
    for answers in generate(
        decoder,
        text,
        prompts,
        sampling,
        max_tokens=options.max_tokens,
        stop=stop,
        use_cache=not options.no_cache,
    ):
        if streams:
            print(answers[0].text[shown:], end="", flush=True)
            shown = len(answers[0].text)
    seconds = time.perf_counter() - begun
    if streams:
        print()
    else:
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
            print(f"--- {number}: {prompt}\n{answer.text}")
    return answers, seconds


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.generate", description="Continues text with a trained model."
    )
    parser.add_argument(
        "source", type=Path, help="runs/NAME, a checkpoint, an imported or a Hugging Face folder"
    )
    parser.add_argument(
        "prompt", nargs="*", help="text to continue; several are one batch; - reads standard input"
    )
    parser.add_argument("--checkpoint", help="of a run: batch-..., instead of the newest whole one")
    parser.add_argument("--file", type=Path, help="further prompts, one per line")
    parser.add_argument("--max-tokens", type=_at_least(int, 1), default=128, help="default: 128")
    parser.add_argument(
        "--temperature",
        type=_at_least(float, 0),
        default=0.8,
        help="0 takes the likeliest token (default: 0.8)",
    )
    parser.add_argument("--top-k", type=_at_least(int, 1), help="only the K likeliest tokens")
    parser.add_argument("--top-p", type=_share, help="only the likeliest tokens that reach this probability")
    parser.add_argument("--min-p", type=_share, help="only tokens this share as likely as the likeliest")
    parser.add_argument(
        "--repetition-penalty", type=_at_least(float, 1), default=1.0, help="default: 1, none"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put each prompt in ChatML, as DBRX Instruct expects"
    )
    parser.add_argument("--system", help="with --chat: the system message")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights (default: fp32)"
    )
    parser.add_argument(
        "--device", help="cpu or cuda (default: cuda where there is one; not yet run on a GPU)"
    )
    parser.add_argument("--no-cache", action="store_true", help="recompute keys and values for each token")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write prompts and answers as JSON too")
    options = parser.parse_intermixed_args(arguments)
    if options.system and not options.chat:
        parser.error("--system needs --chat")
    return options


def _at_least(kind: type, least: float) -> Any:
    def number(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return number


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
