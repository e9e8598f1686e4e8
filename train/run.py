"""One run, from a checked recipe to a trained model and its report. Read `run` first."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from composer import Trainer
from composer.core import Callback
from composer.loggers import LoggerDestination
from composer.utils import dist, get_device
from torch.optim import Optimizer

from train import provenance, sizing
from train.callbacks.checkpointing import Checkpointing
from train.callbacks.console import Console
from train.callbacks.expert_load import ExpertLoad
from train.callbacks.learning_rate import LearningRate
from train.callbacks.run_tracker import RunTracker
from train.callbacks.throughput import Throughput
from train.callbacks.update import BeforeUpdate
from train.checkpoint import Progress, load_checkpoint, newest_whole_checkpoint
from train.composer_model import LanguageModel
from train.device import describe_hardware, measured_peak_flops, supports_bf16
from train.init import initialize
from train.model import Decoder
from train.optim import build_optimizer
from train.parallel import build_mesh, build_sharded
from train.recipe import RecipeError
from train.run_folder import CHECKPOINTS_FOLDER, claim_run_folder
from train.schema import Precision, Recipe
from train.topology import Topology
from train.trainer import build_trainer

Result = TypeVar("Result")


@dataclass(frozen=True)
class Machine:
    """What the run computes on."""

    topology: Topology
    device_type: str
    precision: Precision

    @property
    def matrix_dtype(self) -> torch.dtype:
        """Type of the operands of matrix products."""
        return torch.bfloat16 if self.precision is Precision.bf16 else torch.float32


def run(recipe: Recipe, topology: Topology) -> int:
    """Trains, or goes on training, and leaves the run's folder; returns the exit status."""
    machine = start_processes(recipe, topology)
    claim = on_main(topology, lambda: claim_run_folder(recipe))
    if claim.is_complete:
        say(topology, f"{claim.folder} is complete; on_existing=new or overwrite would train again")
        return 0
    recipe, folder = claim.recipe, claim.folder
    say(topology, f"run folder {folder}")
    shards = on_main(topology, lambda: prepare_shards(recipe))
    model, optimizer = build_model(recipe, machine)
    checkpoint, progress = resume(folder, model, optimizer, topology)
    trainer = assemble(recipe, folder, machine, shards, model, optimizer, checkpoint, progress)
    if progress.batch < sizing.batches(recipe):
        trainer.fit()
    else:
        trainer.eval()
    finish(recipe, folder, machine, shards, trainer)
    trainer.close()
    return 0


def start_processes(recipe: Recipe, topology: Topology) -> Machine:
    """Joins the process group, where there are several ranks, and settles the precision.

    Raises:
        RecipeError: if the recipe asks for bf16 where the device has none.
    """
    device = get_device(None)
    device_type = "cuda" if device.name == "gpu" else "cpu"
    if topology.world_size > 1:
        dist.initialize_dist(device, timeout=600.0)
    precision = recipe.training.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if supports_bf16(device_type) else Precision.fp32
    elif precision is Precision.bf16 and not supports_bf16(device_type):
        raise RecipeError(
            f"this {device_type} has no bf16 arithmetic", key="training.precision", remedy="use auto or fp32"
        )
    return Machine(topology, device_type, precision)


def build_model(recipe: Recipe, machine: Machine) -> tuple[LanguageModel, Optimizer]:
    """Model and optimizer on their device, sharded as the recipe's layout says, initial weights in place."""
    training, topology = recipe.training, machine.topology
    decoder = Decoder(
        recipe.model,
        device="meta",
        activation_checkpointing=training.activation_checkpointing,
        loss_chunk_tokens=training.loss_chunk_tokens,
    )
    if topology.world_size > 1:
        mesh = build_mesh(recipe.parallelism, topology.world_size, machine.device_type)
        build_sharded(decoder, mesh, machine.precision, recipe.seed)
    else:
        decoder.to_empty(device=machine.device_type)
        initialize(decoder, recipe.model, recipe.seed)
    model = LanguageModel(decoder, recipe, machine.precision)
    say(topology, f"model of {sizing.total_parameters(recipe.model):,} parameters, {machine.precision.value}")
    return model, build_optimizer(model, recipe.optimizer)


def resume(
    folder: Path, model: LanguageModel, optimizer: Optimizer, topology: Topology
) -> tuple[Path | None, Progress]:
    """Loads the newest whole checkpoint, if there is one."""
    found, complaints = on_main(topology, lambda: newest_whole_checkpoint(folder / CHECKPOINTS_FOLDER))
    for complaint in complaints:
        say(topology, complaint)
    if found is None:
        return None, Progress(0, 0, 0, 0.0)
    progress = load_checkpoint(found, model, optimizer, topology)
    say(topology, f"resumed from {found}, {progress.tokens:,} tokens")
    return found, progress


def assemble(
    recipe: Recipe,
    folder: Path,
    machine: Machine,
    shards: "Shards",
    model: LanguageModel,
    optimizer: Optimizer,
    checkpoint: Path | None,
    progress: Progress,
) -> Trainer:
    """The Trainer with its loaders, records and checkpoints."""
    topology, batches = machine.topology, sizing.batches(recipe)
    tokenizer = open_tokenizer(recipe.tokenizer, Path(recipe.data.shards))
    callbacks: list[Callback] = [
        LearningRate(recipe),
        BeforeUpdate(recipe.model.moe, recipe.training.clip_norm),
        Checkpointing(folder / CHECKPOINTS_FOLDER, recipe.checkpoint, topology, checkpoint),
    ]
    loggers: list[LoggerDestination] = []
    if topology.is_main:
        flops = sizing.flops_per_token_training(recipe.model, recipe.data.sequence_tokens).total
        peak = measured_peak_flops(machine.device_type, machine.matrix_dtype)
        callbacks += [
            Throughput(flops, peak, topology.world_size, machine.device_type == "cuda"),
            ExpertLoad(folder, batches),
        ]
        loggers = [
            RunTracker(folder, shards.bytes_per_token),
            Console(batches, recipe.tracking.console_interval_batches),
        ]
    return build_trainer(
        recipe,
        model,
        optimizer,
        build_train_loader(
            recipe,
            tokenizer,
            rank=topology.rank,
            world_size=topology.world_size,
            start_sample=progress.samples,
        ),
        build_validation_loaders(recipe, tokenizer, rank=topology.rank, world_size=topology.world_size),
        callbacks,
        loggers,
        progress,
    )


def on_main(topology: Topology, work: Callable[[], Result]) -> Result:
    """Does something on rank 0 alone and gives every rank its result, or its error."""
    if topology.world_size == 1:
        return work()
    outcome: list[Any] = [None, None]
    if topology.is_main:
        try:
            outcome[0] = work()
        except RecipeError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def say(topology: Topology, line: str) -> None:
    """Prints a line, once."""
    if topology.is_main:
        print(line, flush=True)
