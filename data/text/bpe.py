"""Trains a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) with Hugging Face ``tokenizers``."""

import os
from collections.abc import Iterator

from data.text.hugging_face_form import byte_level_pieces, from_letters
from data.tokenizer import EOS, PAD, RankTokenizer, bpe_name
from train.recipe.errors import UserError
from train.recipe.schema import Tokenizer

PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Pieces that no token crosses: a word, up to three digits, a run of other characters, each with the space
before it; white space, whose last character goes to the following word."""

_LEARNT = r" ?\p{L}{1,128}| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,128}|\s{1,128}(?!\S)|\s{1,128}"
"""The same pieces, but for those of more than 128 characters, which are learnt in parts: learning takes time
that grows with the square of the longest piece, and a ruler or a gene may be a million characters long."""

SMALLEST = 258
"""256 bytes and two special tokens."""


def train_bpe(cfg: Tokenizer, texts: Iterator[str]) -> RankTokenizer:
    """Trains a tokenizer of ``cfg.vocab_size`` tokens, or fewer if the text has no more pairs to merge.

    The same texts give the same tokenizer: ties go to the pair that was learnt first.

    Args:
        cfg: the recipe's tokenizer section, of kind ``bpe``.
        texts: training texts.

    Raises:
        UserError: if the vocabulary is too small for all bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special = [EOS, PAD, *cfg.special_tokens]
    if cfg.vocab_size < SMALLEST - 2 + len(special):
        remedy = f"256 bytes and {len(special)} special tokens need {SMALLEST - 2 + len(special)}"
        raise UserError(f"is {cfg.vocab_size}", key="tokenizer.vocab_size", remedy=remedy)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = byte_level_pieces(_LEARNT)
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size - len(special),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    # Training used all cores. Without this setting, every process forked later (tasks, loader workers) would
    # warn about it; with it they tokenise on one core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ranks = {from_letters(letters): rank for letters, rank in learner.get_vocab().items()}
    special_ids = {name: len(ranks) + number for number, name in enumerate(special)}
    return RankTokenizer(bpe_name(cfg), PATTERN, ranks, special_ids)
