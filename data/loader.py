"""Batches of token ids for one rank, in an order that depends only on the recipe.

Position n of training is one sample, a sequence of the shards' length; see :mod:`data.order.plan`. The stages
of :mod:`train.recipe.curriculum` define which positions a batch holds and how many of them make up a
sequence; rank r takes the r-th contiguous part of a batch. Ranks that share sequences all read the whole part
of their group, which is the rank here. Worker processes take groups of whole batches in
turn, and the loader returns them in order, so the number of workers changes nothing.

**Resuming.** The loader has no state: it starts at ``start_sample``. A trainer saves how many samples it has
trained on over all ranks (Composer's ``timestamp.sample``), and builds a new loader with that number. Nothing
is read and discarded, nothing is skipped, and the number of ranks or workers and the batch size may change.

With Composer: the loader has no length and never ends, so a run is one epoch and stops at ``max_duration``.
The Trainer needs ``spin_dataloaders=False``; otherwise it would drop as many batches as it had trained. It
then does not restore the random-number state, which must be restored before ``fit``; iterating these loaders
draws nothing from the global generators.
"""

import itertools
import math
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.batch import NO_TARGET, Batch, batch_of_block, make_batch, make_block, open_block
from data.fill_in_middle import FillInMiddleTransform, open_fill_in_middle
from data.opened import OpenedData
from data.order.plan import OrderPlan
from data.shards.enough import require_validation
from data.shards.manifest import unigram_entropy
from data.shards.packing import PADDING, Sample
from data.shards.streams import ShardFolder
from train.recipe.curriculum import Curriculum, Stage, plan_stages
from train.recipe.errors import UserError

# B sequences of a rank's batch, S tokens per sequence.

NO_POSITION = -1
"""Position of a padding sequence in a validation batch."""
BLOCK_TOKENS = 1 << 17
"""A worker sends batches to the trainer in blocks of at most this many tokens, 2.6 MB ..."""
BLOCK_BATCHES = 16
"""... and at most this many batches, so that the first small batch does not wait for many others."""
PREFETCHED_BLOCKS = 2


class Samples(Protocol):
    """Samples of a domain, by number."""

    def __getitem__(self, number: int, /) -> Sample:
        """Returns one sample."""


class TrainSequences(IterableDataset[Tensor | UserError]):
    """One rank's batches from a position on, endless, in blocks of one or more batches.

    Batches that the curriculum excludes are skipped without being read.
    """

    def __init__(
        self,
        plan: OrderPlan,
        folders: Sequence[Samples],
        curriculum: Curriculum,
        *,
        rank: int,
        world_size: int,
        start: int,
        fill_in_middle: FillInMiddleTransform | None = None,
    ) -> None:
        """Sets up the sequences; reads nothing yet.

        Args:
            plan: the order of the run.
            folders: samples of each of the plan's domains, as a :class:`ShardFolder` has them.
            curriculum: the stages from which the plan was built.
            rank: this process's rank.
            world_size: number of ranks; divides the batch of every stage from ``start`` on.
            start: first position, at the beginning of a batch.
            fill_in_middle: rearranges documents of stages that ask for it; None: none does.
        """
        assert 0 <= rank < world_size
        self.plan, self.folders, self._curriculum = plan, folders, curriculum
        self._rank, self._world_size, self._start = rank, world_size, start
        self._fill_in_middle = fill_in_middle

    def __iter__(self) -> Iterator[Tensor | UserError]:
        """Yields the blocks of this rank, or of one of its workers; an error comes last."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for stage, batches in itertools.islice(self._blocks(), number, None, workers):
            try:
                yield self._read(stage, batches)
            except UserError as error:
                # Sent as a value, since an exception raised in a worker reaches the trainer as a long
                # traceback.
                yield error
                return

    def _blocks(self) -> Iterator[tuple[Stage, range]]:
        """Yields the run's batches in groups that are sent together, each within one stage; endless."""
        batch = self._curriculum.batch_at(self._start)
        while True:
            batch = self._curriculum.trained_from(batch)
            stage = self._curriculum.stage_of(batch)
            tokens = stage.batch_samples * self._curriculum.sample_tokens // self._world_size
            end = batch + min(BLOCK_BATCHES, max(1, BLOCK_TOKENS // tokens))
            if batch < stage.end_batch:
                end = min(end, stage.end_batch)
            end = next((first for first, _ in self._curriculum.skipped if batch < first < end), end)
            yield stage, range(batch, end)
            batch = end

    def _read(self, stage: Stage, batches: range) -> Tensor:
        """Reads this rank's part of some batches as a block."""
        step, mine = stage.sequence_samples, stage.batch_sequences // self._world_size
        starts = stage.first_sample + (np.array(batches) - stage.first_batch) * stage.batch_samples
        starts += self._rank * mine * step
        positions = (starts[:, None] + np.arange(mine * step)).ravel()
        picks = self.plan.pick(positions)
        samples = [
            self.folders[domain][sample]
            for domain, sample in zip(picks.domain.tolist(), picks.sample.tolist(), strict=True)
        ]
        if self._fill_in_middle is not None and stage.fill_in_middle:
            for first in range(0, positions.size, step):
                row = slice(first, first + step)
                samples[row] = self._fill_in_middle.rearrange(
                    samples[row],
                    picks.sample[row],
                    position=int(positions[first]),
                    domain=self.plan.domains[int(picks.domain[first])],
                    stage=stage,
                )
        follows = np.zeros(positions.size, bool)
        follows[1:] = np.diff(picks.sample) == 1
        follows[::step] = False
        return make_block(
            samples, positions[::step], picks.domain[::step], follows=follows, step=step, batch=mine
        )


class TrainLoader(DataLoader[Any]):
    """A rank's training batches."""

    dataset: TrainSequences

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yields batches of named tensors, views of the blocks that workers send.

        Raises:
            UserError: one line that names a missing, truncated or altered shard.
        """
        for block in super().__iter__():
            if isinstance(block, UserError):
                raise block
            tensors, size = open_block(block), batch_of_block(block)
            for begin in range(0, tensors["input_ids"].shape[0], size):
                yield {key: tensor[begin : begin + size] for key, tensor in tensors.items()}


class ValidationSequences(IterableDataset[Batch]):
    """One rank's share of a domain's validation sequences, the same at every evaluation.

    They are spread evenly over the split. Every rank gets the same number: if they do not divide evenly,
    padding sequences without targets are added.
    """

    def __init__(
        self,
        folder: ShardFolder,
        *,
        domain: int,
        sequences: int,
        rank: int,
        world_size: int,
        batch: int,
        pad_id: int,
    ) -> None:
        """Sets up the sequences; reads nothing yet.

        Args:
            folder: shards of the validation split.
            domain: index of the domain in the order of the plan.
            sequences: how many to read, over all ranks; at most ``len(folder)``.
            rank: this process's rank.
            world_size: number of ranks.
            batch: sequences per rank and batch.
            pad_id: the padding token.
        """
        self._folder, self._domain, self._batch, self._pad_id = folder, domain, batch, pad_id
        self._chosen = np.arange(sequences) * len(folder) // sequences
        per_rank = math.ceil(sequences / world_size)
        self._mine = range(rank * per_rank, (rank + 1) * per_rank)

    def __iter__(self) -> Iterator[Batch]:
        """Yields this rank's batches; the last may be smaller."""
        for begin in range(0, len(self._mine), self._batch):
            places = np.array(self._mine[begin : begin + self._batch])
            samples = [self._sample(place) for place in places]
            positions = np.where(places < len(self._chosen), places, NO_POSITION)
            yield make_batch(samples, positions, np.full(places.size, self._domain))

    def __len__(self) -> int:
        """Batches of this rank, equal on all ranks."""
        return math.ceil(len(self._mine) / self._batch)

    def unigram_entropy(self) -> float:
        """Unigram entropy of the targets of all ranks, in nats per token."""
        samples = [self._folder[int(number)] for number in self._chosen]
        targets = make_batch(samples, np.arange(len(samples)), np.zeros(len(samples), np.int64))["targets"]
        return unigram_entropy(targets[targets != NO_TARGET].numpy())

    def _sample(self, place: int) -> Sample:
        if place < len(self._chosen):
            return self._folder[int(self._chosen[place])]
        size = self._folder[0].tokens.size
        return Sample(
            np.full(size, self._pad_id, np.int32), np.array([size], np.int32), np.array([PADDING], np.int64)
        )


def build_train_loader(
    opened: OpenedData,
    curriculum: Curriculum | None = None,
    *,
    rank: int,
    world_size: int,
    start_sample: int = 0,
) -> TrainLoader:
    """Builds the loader of a rank's training batches; see the module's docstring for resuming.

    A batch has ``input_ids`` int64 [B, S], ``document_ids`` int32 [B, S] (the number of each token's document
    within its sequence), ``targets`` int64 [B, S] (the next token, even if it begins another document; -100
    at the end of a sequence, before padding, and between joined samples that are not neighbours),
    ``sample_positions`` int64 [B] (the position in the run of the sequence's first sample) and ``domain_ids``
    int64 [B] (indices into the sorted names of the domains). With samples that have a loss mask, ``targets``
    are -100 where it says so too, and ``continues`` bool [B, S] is where they would be none without it. On a
    GPU machine the batches are in pinned memory (not yet run on a GPU).

    Args:
        opened: the run's data.
        rank: this process's rank.
        world_size: number of ranks; divides the global batch.
        start_sample: samples already trained on, over all ranks; at the beginning of a batch.
        curriculum: the run's stages; None: those of a new run.

    Raises:
        UserError: if the shards do not match the recipe.
    """
    opened.require_match()
    curriculum = curriculum or plan_stages(opened.recipe)
    plan = opened.plan(curriculum)
    dataset = TrainSequences(
        plan,
        [opened.shards(domain, "train") for domain in plan.domains],
        curriculum,
        rank=rank,
        world_size=world_size,
        start=start_sample,
        fill_in_middle=open_fill_in_middle(opened.tokenizer, opened.recipe, curriculum),
    )
    return open_loader(dataset, opened.recipe.data.workers)


def open_loader(dataset: TrainSequences, workers: int) -> TrainLoader:
    """Builds the loader of a rank's batches, read in ``workers`` processes or, with 0, in this one."""
    options: dict[str, Any] = {}
    if workers:
        # Forked workers inherit all imports; spawned ones would import everything again.
        options = {
            "multiprocessing_context": "fork",
            "prefetch_factor": PREFETCHED_BLOCKS,
            "worker_init_fn": outlive_signals,
        }
    return TrainLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Otherwise each iterator would draw its seed from the global generator.
        generator=torch.Generator(),
        **options,
    )


def outlive_signals(_worker: int = 0) -> None:
    """Makes this process survive Ctrl-C and one SIGTERM; the second, from the loader's shutdown, ends it.

    Schedulers such as SLURM send SIGTERM, and terminals SIGINT, to every process of a job, and a rank that is
    to save after the current batch must not lose the worker that reads it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def build_validation_loaders(
    opened: OpenedData, *, rank: int, world_size: int
) -> dict[str, DataLoader[Batch]]:
    """Builds the loaders of a rank's validation batches by domain, with the keys of a training batch.

    ``sample_positions`` are indices among the domain's validation sequences, -1 for padding sequences. The
    batches are few, so they are read in this process.

    Raises:
        UserError: if the shards do not match the recipe or hold too few sequences.
    """
    datasets = _validation_sequences(opened, rank, world_size)
    return {
        domain: DataLoader(
            dataset, batch_size=None, pin_memory=torch.cuda.is_available(), generator=torch.Generator()
        )
        for domain, dataset in datasets.items()
    }


def validation_entropy(opened: OpenedData) -> dict[str, float]:
    """Unigram entropy of each domain's validation targets, in nats per token.

    Reads the sequences of all ranks, so only one rank needs to call it.

    Raises:
        UserError: as :func:`build_validation_loaders`.
    """
    datasets = _validation_sequences(opened, rank=0, world_size=1)
    return {domain: dataset.unigram_entropy() for domain, dataset in datasets.items()}


def _validation_sequences(opened: OpenedData, rank: int, world_size: int) -> dict[str, ValidationSequences]:
    opened.require_match()
    recipe, found = opened.recipe, {}
    require_validation(opened.manifest, recipe)
    for index, domain in enumerate(opened.validated_domains):
        found[domain] = ValidationSequences(
            opened.shards(domain, "validation"),
            domain=index,
            sequences=recipe.data.validation_sequences,
            rank=rank,
            world_size=world_size,
            # Every rank has whole sequences here, also those that share a microbatch's in training.
            batch=max(1, recipe.training.microbatch_sequences // recipe.parallelism.sharing),
            pad_id=opened.tokenizer.pad_id,
        )
    return found
