"""Sample text at the end of a run: a few continuations in `sample.txt`, for a quick look."""

from pathlib import Path

from train.generate.generation import OwnText, generate
from train.generate.sampling import Sampling
from train.model.decoder import Decoder
from train.record.run_folder import SAMPLE_FILE

PROMPTS = ("def ", "The ", "Returns the ", "import ")
TOKENS = 60


def write_sample(folder: Path, decoder: Decoder, text: OwnText) -> None:
    """Continues each prompt; the decoder must be whole on one device."""
    was_training = decoder.training
    tokens = min(TOKENS, decoder.cfg.max_sequence_tokens // 2)
    steps = generate(decoder.eval(), text, PROMPTS, Sampling(temperature=0.7), max_tokens=tokens)
    *_, answers = steps
    decoder.train(was_training)
    (folder / SAMPLE_FILE).write_text(
        "".join(f"{prompt}{answer.text}\n\n" for prompt, answer in zip(PROMPTS, answers, strict=True))
    )
