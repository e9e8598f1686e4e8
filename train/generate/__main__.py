"""Text generation: `python -m train.generate runs/NAME "Once upon a time"`.

Several prompts form one batch; the answer to a single prompt is streamed. Takes a run, a checkpoint, an
imported folder or a Hugging Face folder. With `--chat` prompts are a user's messages, rendered by the chat
template that the weights were tuned with; without any, on a terminal, one talks with the model.
"""

import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from train.recipe.errors import UserError
from train.record import log
from train.record.command import Figures, at_least, command

if TYPE_CHECKING:
    from data.text.conversations import Turn
    from train.generate.chat import ChatText
    from train.generate.generation import Answer, ChatTokenizer, Text
    from train.generate.sampling import Sampling
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
    parser.add_argument(
        "--file",
        type=Path,
        help="file of further prompts, one per line; with --chat and .jsonl: chats, one per line",
    )
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
        "--chat",
        action="store_true",
        help="prompts are a user's messages, in the chat template of the weights; without prompts: talk on a "
        "terminal, or answer standard input",
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="with --chat: Jinja in place of the weights' own"
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
    if options.chat:
        return chat(options)
    prompts = prompts_of(options)
    decoder, text = load(options)
    answers, seconds = write_answers(decoder, text, prompts, prompts, options)
    return _figures(prompts, answers, seconds)


def chat(options: Namespace) -> Figures:
    """Answers every chat, or talks on a terminal."""
    if not options.prompt and not options.file and sys.stdin.isatty():
        decoder, text = load(options)
        return _talk(decoder, text, options)
    chats = chats_of(options)
    decoder, text = load(options)
    rendered = _chat_text(text, options)
    prompts = [rendered.prompt(turns) for turns in chats]
    said = [turns[-1][1] for turns in chats]
    answers, seconds = write_answers(decoder, rendered, prompts, said, options, rendered.stop)
    return _figures(prompts, answers, seconds)


def _figures(prompts: "Sequence[str]", answers: "Sequence[Answer]", seconds: float) -> Figures:
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
        UserError: if there is none, or if an option of chats is given without --chat.
    """
    for name, given in (("--system", options.system), ("--chat-template", options.chat_template)):
        if given and not options.chat:
            raise UserError(f"{name} needs --chat")
    prompts = list(options.prompt)
    if options.file:
        prompts += [line for line in options.file.read_text().splitlines() if line.strip()]
    if prompts == ["-"]:
        prompts = [sys.stdin.read()]
    if not prompts:
        raise UserError("no prompt; give one, or use --file, or - for standard input")
    return prompts


def chats_of(options: Namespace) -> "list[list[Turn]]":
    """Returns a chat for each prompt, or those of a JSONL file; standard input, if nothing is given.

    Raises:
        UserError: if there is none, or a line of the file is none.
    """
    from train.generate.chat import read_chats

    if options.file and options.file.suffix == ".jsonl":
        if options.prompt or options.system:
            raise UserError(f"{options.file} has whole chats; give no prompts and no --system with it")
        if not (chats := read_chats(options.file)):
            raise UserError(f"{options.file} has no chat")
        return chats
    if not options.prompt and not options.file:
        options.prompt = ["-"]
    return [[*_system(options), ("user", prompt)] for prompt in prompts_of(options)]


def _system(options: Namespace) -> "list[Turn]":
    return [("system", options.system)] if options.system else []


def _chat_text(text: "ChatTokenizer", options: Namespace) -> "ChatText":
    from train.generate.chat import ChatText

    return ChatText(text, options.chat_template)


def _talk(decoder: "Decoder", text: "ChatTokenizer", options: Namespace) -> Figures:
    """Talks on a terminal until its end; an answer is cut off by Ctrl-C, or where the model's tokens end."""
    with suppress(ImportError):
        import readline  # noqa: F401  # Line editing and history for input().
    rendered, limit = _chat_text(text, options), decoder.cfg.max_sequence_tokens
    turns = _system(options)
    rows: list[dict[str, object]] = []
    logger.info("generate: /new begins another chat; Ctrl-C ends an answer, Ctrl-D the chat")
    begun = time.perf_counter()
    while True:
        try:
            words = input("> ").strip()
        except EOFError:
            print()
            return Figures({"seconds": time.perf_counter() - begun, "answers": rows})
        if words == "/new":
            turns = _system(options)
        if words in ("", "/new"):
            continue
        asked = [*turns, ("user", words)]
        try:
            prompt = rendered.prompt(asked)
            room = limit - len(rendered.encode(prompt))
            if room < 1:
                raise UserError(f"the chat fills the model's {limit} tokens; /new begins another")
            fitting = Namespace(**vars(options) | {"max_tokens": min(options.max_tokens, room)})
            answers, _ = write_answers(
                decoder, rendered, [prompt], [words], fitting, rendered.stop, may_be_cut=True
            )
        except UserError as error:
            logger.error(f"generate: {error}")
            continue
        turns = [*asked, ("assistant", answers[0].text)]
        rows.append({"prompt": prompt, **asdict(answers[0])})


def load(options: Namespace) -> "tuple[Decoder, ChatTokenizer]":
    """Loads the decoder and its tokenizer."""
    import torch

    from train.generate.generation import text_of
    from train.hf.open_decoder import open_decoder

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    decoder, source = open_decoder(options.source, options.checkpoint, options.device, dtype)
    return decoder, text_of(source)


def write_answers(
    decoder: "Decoder",
    text: "Text",
    prompts: Sequence[str],
    said: Sequence[str],
    options: Namespace,
    stop: Sequence[str] = (),
    *,
    may_be_cut: bool = False,
) -> "tuple[list[Answer], float]":
    """Prints the answers, streaming a single one, and returns them with the seconds they took.

    Args:
        decoder: the model.
        text: its tokenizer.
        prompts: texts to continue.
        said: how to show each of them.
        options: of the command line.
        stop: texts that end an answer, besides those of the options.
        may_be_cut: Ctrl-C ends an answer instead of the command.
    """
    from train.generate.generation import generate

    begun = time.perf_counter()
    streams = len(prompts) == 1
    shown = 0
    answers: list[Answer] = []
    steps = generate(
        decoder,
        text,
        prompts,
        _sampling(options),
        max_tokens=options.max_tokens,
        stop=[*options.stop, *stop],
        use_cache=not options.no_cache,
    )
    try:
        for answers in steps:
            if streams:
                print(answers[0].text[shown:], end="", flush=True)
                shown = len(answers[0].text)
    except KeyboardInterrupt:
        # In a talk, what a person has read of an answer stays.
        if not may_be_cut or not answers:
            raise
        answers[0].ending = "interrupted"
    seconds = time.perf_counter() - begun
    if streams:
        print()
    else:
        for number, (prompt, answer) in enumerate(zip(said, answers, strict=True), 1):
            print(f"--- {number}: {prompt}\n{answer.text}")
    return answers, seconds


def _sampling(options: Namespace) -> "Sampling":
    from train.generate.sampling import Sampling

    return Sampling(
        repetition_penalty=options.repetition_penalty,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
    )


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError("must be above 0 and at most 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
