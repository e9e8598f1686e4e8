"""Text generation: `python -m train.generate runs/NAME "Once upon a time"`.

Several prompts form one batch; the answer to a single prompt is streamed. Takes a run, a checkpoint, an
imported folder or a Hugging Face folder.
"""

import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from train.generate.chat import END, Message, chatml
from train.recipe.errors import UserError
from train.record import log
from train.record.command import Figures, at_least, command

if TYPE_CHECKING:
    from train.generate.generation import Answer, Text
    from train.model.decoder import Decoder

logger = log.get_logger("train.generate")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "source", type=Path, help="runs/NAME, a checkpoint, an imported or a Hugging Face folder"
    )
    parser.add_argument(
        "prompt", nargs="*", help="text to continue; several form one batch; - reads standard input"
    )
    parser.add_argument(
        "--checkpoint", help="a run's checkpoint, batch-... (default: the newest complete one)"
    )
    parser.add_argument("--file", type=Path, help="file of further prompts, one per line")
    parser.add_argument("--max-tokens", type=at_least(int, 1), default=128, help="default: 128")
    parser.add_argument(
        "--temperature",
        type=at_least(float, 0),
        default=0.8,
        help="0: greedy decoding (default: 0.8)",
    )
    parser.add_argument("--top-k", type=at_least(int, 1), help="sample from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=_share, help="sample from the most likely tokens that together reach this probability"
    )
    parser.add_argument(
        "--min-p", type=_share, help="sample from tokens at least this fraction as likely as the most likely"
    )
    parser.add_argument("--repetition-penalty", type=at_least(float, 1), default=1.0, help="default: 1, none")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer; repeatable"
    )
    parser.add_argument(
        "--chat", action="store_true", help="wrap each prompt in ChatML, as DBRX Instruct expects"
    )
    parser.add_argument("--system", help="with --chat: the system message")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="data type of the weights (default: fp32)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available; not yet run on a GPU)")
    parser.add_argument("--no-cache", action="store_true", help="recompute keys and values for each token")


@command(
    "python -m train.generate",
    "Continues text with a trained model.",
    add_arguments,
    json="also write prompts and answers as JSON",
    name="generate",
    mistakes=(OSError, ValueError),
    intermixed=True,
)
def main(options: Namespace) -> Figures:
    """Answers every prompt."""
    logger.info(f"generate: loading {options.source}; importing torch first")
    prompts = prompts_of(options)
    decoder, text = load(options)
    answers, seconds = write_answers(decoder, text, prompts, options)
    tokens = sum(len(answer.ids) for answer in answers)
    logger.info(
        f"generate: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s; ended by "
        f"{', '.join(sorted({answer.ending for answer in answers}))}"
    )
    rows = [{"prompt": prompt, **asdict(answer)} for prompt, answer in zip(prompts, answers, strict=True)]
    return Figures({"seconds": seconds, "answers": rows})


def prompts_of(options: Namespace) -> list[str]:
    """Returns the prompts of the command line and of a file (one per line), or standard input as one prompt.

    Raises:
        UserError: if there is none, or if a system message is given without --chat.
    """
    if options.system and not options.chat:
        raise UserError("--system needs --chat")
    prompts = list(options.prompt)
    if options.file:
        prompts += [line for line in options.file.read_text().splitlines() if line.strip()]
    if prompts == ["-"]:
        prompts = [sys.stdin.read()]
    if not prompts:
        raise UserError("no prompt; give one, or use --file, or - for standard input")
    if not options.chat:
        return prompts
    system = [Message("system", options.system)] if options.system else []
    return [chatml([*system, Message("user", prompt)]) for prompt in prompts]


def load(options: Namespace) -> "tuple[Decoder, Text]":
    """Loads the decoder and its tokenizer."""
    import torch

    from train.generate.generation import text_of
    from train.hf.open_decoder import open_decoder

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    decoder, source = open_decoder(options.source, options.checkpoint, options.device, dtype)
    return decoder, text_of(source)


def write_answers(
    decoder: "Decoder", text: "Text", prompts: Sequence[str], options: Namespace
) -> "tuple[list[Answer], float]":
    """Prints the answers, streaming a single one, and returns them with the seconds they took."""
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


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError("must be above 0 and at most 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
