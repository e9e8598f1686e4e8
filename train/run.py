"""One run, from a checked recipe to a trained model and its report. Read `run` first."""

import functools
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from composer import Trainer
from composer.core import Callback
from composer.loggers import LoggerDestination
from torch.optim import Optimizer

from data.loader import build_train_loader, build_validation_loaders, validation_entropy
from data.opened import OpenedData
from data.order.plan import OrderPlan
from data.shards.manifest import Manifest
from data.write_shards import ensure_shards
from train.checkpoint.files import Progress
from train.checkpoint.memory_files import layout_digest
from train.checkpoint.memory_writer import MemoryWriter
from train.evaluate.in_training import SuiteEvaluation
from train.evaluate.scorer import Scorer
from train.evaluate.suite import load_suite
from train.evaluate.tasks import hugging_face_tokenizer
from train.generate.generation import OwnText
from train.generate.sample_text import write_sample
from train.health.descriptors import raise_descriptor_limit
from train.health.exclusion import refuse_excluded, report_corruption
from train.health.heartbeat import clear_records, is_supervised, record_failure, records_folder
from train.health.joining import hosts_of_ranks, join, outlast_watchdog
from train.health.watched import Watched, watched
from train.hf.initial_weights import freeze
from train.hf.start import require_start_tokenizer
from train.layout.device import (
    add_in_fixed_order,
    describe_hardware,
    measured_peak_flops,
    supports_bf16,
)
from train.layout.mesh import build_mesh, build_sharded, replicas_of
from train.layout.optim import build_optimizer
from train.layout.ranks import log_on_rank_0, run_on_rank_0
from train.model.compiling import compile_decoder
from train.model.decoder import Decoder
from train.model.init import initialize
from train.model.scaled_products import require_kernels, try_kernels
from train.preflight.together import is_wanted, preflight
from train.recipe import sizes
from train.recipe.curriculum import Curriculum
from train.recipe.errors import UserError
from train.recipe.exit_status import REPLAY_STATUS, UNFIT_STATUS
from train.recipe.phase_layouts import laid_out, next_layout
from train.recipe.phases import domains_of, widest
from train.recipe.schema import ExpertPrecision, LossMean, Precision, Recipe
from train.recipe.topology import Topology
from train.record import provenance
from train.record.changes import fork_of, read_changes
from train.record.console import Console
from train.record.expert_load import ExpertLoad
from train.record.host_memory import memory_folder, take_token
from train.record.lease import EXPIRY_SECONDS, GRACE_SECONDS, release
from train.record.log import quiet_libraries
from train.record.run_folder import (
    CHECKPOINTS_FOLDER,
    REPORT_FILE,
    claim_run_folder,
)
from train.record.run_tracker import RunTracker
from train.record.start_times import START_CLOCK
from train.record.summary import DatasetInput, Summary, write_summary
from train.record.system_load import SystemLoad
from train.record.throughput import Throughput
from train.report.run_page import write_report
from train.start.fork import fork_if_new
from train.start.resume import Resumed, accept, data_digests, drop_after, find_checkpoint, keep, load_weights
from train.step.alarms import Alarms, NotFiniteError
from train.step.checkpointing import Checkpointing
from train.step.data_log import DataLog, Domain, WrongDataError
from train.step.guard import UpdateGuard
from train.step.language_model import LanguageModel
from train.step.observers import observers
from train.step.recheck import Corruption, CorruptionError, Recheck
from train.step.rollback import Rollback, RollbackError, documents_of
from train.step.step import TrainingStep
from train.tracking.loggers import other_loggers
from train.tracking.uploader import MlflowUploader
from train.trainer import build_trainer, composer_device


@dataclass(frozen=True)
class Machine:
    """The device type and precision that a run computes with, and its ranks."""

    topology: Topology
    device_type: str
    precision: Precision

    @property
    def matrix_dtype(self) -> torch.dtype:
        """Data type of the operands of matrix products."""
        return torch.bfloat16 if self.precision is Precision.bf16 else torch.float32


def run(recipe: Recipe, topology: Topology) -> int:
    """Trains or resumes training, fills the run's folder and returns the exit status."""
    START_CLOCK.begin("join")
    machine = start_processes(recipe, topology)
    START_CLOCK.begin("run folder")
    # Ranks of a try that a supervisor has just ended may still be ending.
    grace = EXPIRY_SECONDS if is_supervised() else GRACE_SECONDS
    claim = run_on_rank_0(topology, lambda: claim_run_folder(recipe, grace))
    try:
        if claim.is_complete:
            line = (
                f"{claim.folder} is complete; on_existing=new trains another run, and "
                f"name=NEW start.run={claim.folder} continues it in another"
            )
            log_on_rank_0(topology, line)
            return 0
        return run_claimed(claim.recipe, claim.folder, machine)
    finally:
        if topology.is_main:
            release(claim.folder)


def run_claimed(recipe: Recipe, folder: Path, machine: Machine) -> int:
    """Trains or resumes training in a folder that rank 0 holds; returns the exit status."""
    topology = machine.topology
    log_on_rank_0(topology, f"run folder {folder}")
    if not is_supervised():
        run_on_rank_0(topology, lambda: clear_records(records_folder(folder)))
    START_CLOCK.begin("shards")
    opened = OpenedData(recipe)
    run_on_rank_0(topology, lambda: ensure_shards(opened))
    opened.fetch()
    quiet_libraries()
    START_CLOCK.begin("preflight")
    if is_wanted(recipe.preflight, topology) and not is_fit(opened, folder, machine):
        return UNFIT_STATUS
    START_CLOCK.begin("check checkpoint")
    fork_if_new(opened, folder, topology)
    resumed = find_checkpoint(recipe, folder, topology)
    if not resumed.progress.batch:
        run_on_rank_0(topology, lambda: require_start_tokenizer(recipe, opened.tokenizer))
    run_on_rank_0(topology, lambda: accept(opened, folder, resumed.curriculum))
    run_on_rank_0(topology, lambda: drop_after(folder, resumed.progress.batch))
    uploader = start_uploader(opened, folder) if topology.is_main else None
    status = "FAILED"
    try:
        train_to_end(opened, folder, machine, resumed)
        status = "FINISHED"
    except (NotFiniteError, RollbackError, WrongDataError) as error:
        line = f"{error}; ended with status {REPLAY_STATUS}: the same command resumes the run"
        log_on_rank_0(topology, line, logging.WARNING)
        return REPLAY_STATUS
    except CorruptionError as error:
        line = f"{error}; ended with status {UNFIT_STATUS}: the same command resumes the run"
        log_on_rank_0(topology, line, logging.ERROR)
        return UNFIT_STATUS
    except SystemExit:
        status = "KILLED"
        raise
    finally:
        if uploader:
            uploader.finish(status)
    log_on_rank_0(topology, f"everything of this run is in {folder}; open {folder / REPORT_FILE}")
    return 0


def start_uploader(opened: OpenedData, folder: Path) -> MlflowUploader:
    """Starts sending the run to MLflow, which learns of which run it is a fork."""
    fork = fork_of(read_changes(folder))
    tags = {"fork_of": f"{fork.fork_of} at batch {fork.batch}"} if fork else {}
    uploader = MlflowUploader(folder, opened.recipe, dataset_inputs(opened), tags)
    uploader.start()
    return uploader


def train_to_end(opened: OpenedData, folder: Path, machine: Machine, resumed: Resumed) -> None:
    """Trains from the checkpoint to the end under the watchdog, then writes summary and report.

    In the layout of the phase that the run is in: where the next one has another, training ends too.
    """
    recipe = laid_out(opened.recipe, resumed.curriculum, resumed.progress.batch)
    opened, kept = opened.under(recipe), opened.recipe
    with watched(recipe, folder, machine.topology) as watch:
        START_CLOCK.begin("model")
        model, optimizer = build_model(recipe, machine, is_resumed=resumed.is_resumed)
        watch.move("loading the checkpoint")
        START_CLOCK.begin("load")
        load_weights(recipe, resumed, model, optimizer, machine.topology)
        watch.move("opening shards")
        START_CLOCK.begin("loaders")
        trainer = assemble(opened, folder, machine, model, optimizer, resumed, watch)
        digests = data_digests(opened)
        run_on_rank_0(machine.topology, lambda: keep(kept, folder, digests, resumed.progress))
        if resumed.progress.batch < resumed.curriculum.batches:
            START_CLOCK.begin("first step")
            trainer.fit()
        else:
            trainer.eval()
        losses = final_losses(trainer, opened.validated_domains)
    if machine.topology.is_main:
        finish(opened, folder, machine, trainer, losses)
    trainer.close()


def is_fit(opened: OpenedData, folder: Path, machine: Machine) -> bool:
    """Checks nodes and links, logs the findings and returns whether the run may start."""
    topology = machine.topology
    with watched(opened.recipe, folder, topology) as watch:
        watch.move("preflight")
        findings = preflight(opened, folder, topology, torch.device(machine.device_type))
    for _, line in findings.warnings:
        log_on_rank_0(topology, f"preflight: {line}", logging.WARNING)
    for ranks, line in findings.faults:
        log_on_rank_0(topology, f"preflight: UNFIT: {line}", logging.ERROR)
        if topology.rank in ranks:
            record_failure(records_folder(folder), topology, 0, UnfitError(line))
    if not findings.faults:
        log_on_rank_0(topology, f"preflight: fit; {findings.speed}")
    return not findings.faults


class UnfitError(RuntimeError):
    """A machine that failed the preflight checks."""


def start_processes(recipe: Recipe, topology: Topology) -> Machine:
    """Joins the process group, if there are several ranks, and chooses the precision.

    Raises:
        UserError: if the recipe asks for bf16 and the device does not support it, or if this node allows too
            few open files.
        SystemExit: with status 78 if this host is excluded from the job.
    """
    device = composer_device()
    device_type = "cuda" if device.name == "gpu" else "cpu"
    if device_type == "cuda" and recipe.training.deterministic:
        add_in_fixed_order()
    raise_descriptor_limit(widest(recipe).parallelism, topology, uses_gpus=device_type == "cuda")
    refuse_excluded(records_folder(Path(recipe.runs_dir) / recipe.name), topology)
    if topology.world_size > 1:
        join(recipe, device, topology)
        outlast_watchdog(recipe)
    precision = recipe.training.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if supports_bf16(device_type) else Precision.fp32
    elif precision is Precision.bf16 and not supports_bf16(device_type):
        raise UserError(
            f"this {device_type} does not support bf16", key="training.precision", remedy="use auto or fp32"
        )
    machine = Machine(topology, device_type, precision)
    try_experts(recipe.training.expert_precision, machine)
    return machine


def try_experts(experts: ExpertPrecision, machine: Machine) -> None:
    """Checks that experts in fp8 compute what they should, in the kernels that they should.

    Raises:
        UserError: one line, if they do not, or torch or the GPU has no such kernels.
    """
    if experts is ExpertPrecision.same:
        return
    require_kernels(experts, machine.device_type, is_bf16=machine.precision is Precision.bf16)
    error = try_kernels(experts, machine.device_type)
    how = "in its kernels" if machine.device_type == "cuda" else "emulated"
    log_on_rank_0(machine.topology, f"experts in {experts.value}, {how}; error of a product {error:.1e}")


def build_model(
    recipe: Recipe, machine: Machine, *, is_resumed: bool = False
) -> tuple[LanguageModel, Optimizer]:
    """Builds model and optimizer on their device, sharded in the recipe's layout and initialised.

    Args:
        recipe: the recipe.
        machine: device, precision and ranks.
        is_resumed: a checkpoint fills the weights, which are not drawn: a minute or more for a large model.
    """
    training, topology = recipe.training, machine.topology
    seed = None if is_resumed else recipe.seed
    _, stage, _ = sizes.place_of(recipe.parallelism, topology.world_size, topology.rank)
    decoder = Decoder(
        recipe.model,
        device="meta",
        recompute=sizes.recomputed(training, sizes.layers(recipe.model)),
        loss_chunk_tokens=training.loss_chunk_tokens,
        parts=sizes.stage_parts(recipe.model, recipe.parallelism, stage),
    )
    if topology.world_size > 1:
        mesh = build_mesh(recipe.parallelism, topology.world_size, machine.device_type)
        build_sharded(decoder, mesh, machine.precision, seed)
        outlast_watchdog(recipe)
    else:
        decoder.to_empty(device=machine.device_type)
        initialize(decoder, recipe.model, seed)
    freeze(decoder, recipe.training.frozen)
    compile_decoder(decoder, training.compile, is_sharded=topology.world_size > 1)
    model = LanguageModel(decoder, recipe, machine.precision)
    forced = ", forced balance" if recipe.model.moe and recipe.model.moe.forced_balance else ""
    parameters = sizes.total_parameters(recipe.model)
    log_on_rank_0(topology, f"model of {parameters:,} parameters, {machine.precision.value}{forced}")
    return model, build_optimizer(model, recipe.optimizer, recipe.seed)


def assemble(
    opened: OpenedData,
    folder: Path,
    machine: Machine,
    model: LanguageModel,
    optimizer: Optimizer,
    resumed: Resumed,
    watch: Watched,
) -> Trainer:
    """Builds the Trainer with its loaders, its training step and the callbacks that watch and record it."""
    recipe, shards = opened.recipe, opened.manifest
    topology, curriculum, progress = machine.topology, resumed.curriculum, resumed.progress
    # Evaluation without training uses the last phase that was trained.
    model.decoder.set_rope_theta(curriculum.stage_of(max(0, progress.batch - 1)).rope_theta)
    reader = sizes.reader_of(recipe.parallelism, topology.world_size, topology.rank)
    place = {"rank": topology.rank, "world_size": topology.world_size}
    if recipe.parallelism.pipeline > 1:  # in evaluation too, its stages work on the same sequences
        place = {"rank": reader, "world_size": sizes.readers(recipe.parallelism, topology.world_size)}
    train_loader = build_train_loader(
        opened,
        curriculum,
        start_sample=progress.samples,
        rank=reader,
        world_size=sizes.readers(recipe.parallelism, topology.world_size),
    )
    step = build_step(opened, folder, topology, model, resumed, watch)
    callbacks: list[Callback] = [step, *watch.callbacks()]
    callbacks += observers(recipe, folder, topology, machine.device_type, model.decoder)
    if recipe.evaluation.suite is not None:
        scorer = Scorer(model.decoder, machine.precision, topology, recipe.model.max_sequence_tokens)
        callbacks.append(suite_evaluation(opened, folder, scorer, curriculum.batches, watch.move))
    loggers: list[LoggerDestination] = []
    if topology.is_main:
        callbacks += [
            throughput(recipe, machine, curriculum),
            ExpertLoad(folder, curriculum.batches, step.expert_tokens),
            SystemLoad(machine.device_type == "cuda"),
        ]
        loggers = [
            RunTracker(folder, bytes_per_token(shards, "validation"), bytes_per_token(shards, "train")),
            Console(curriculum.batches, recipe.tracking.console_interval_batches),
            *other_loggers(recipe, folder),
        ]
    validation_loaders = build_validation_loaders(opened, **place)
    trainer = build_trainer(
        recipe, model, optimizer, train_loader, validation_loaders, callbacks, loggers, progress, curriculum
    )
    outlast_watchdog(recipe)  # The callbacks made process groups of their own.
    return trainer


def build_step(
    opened: OpenedData,
    folder: Path,
    topology: Topology,
    model: LanguageModel,
    resumed: Resumed,
    watch: Watched,
) -> TrainingStep:
    """Builds the training step; guard, data log and checkpoint policy resume from the checkpoint."""
    recipe, curriculum, progress = opened.recipe, resumed.curriculum, resumed.progress
    guard = UpdateGuard(recipe.guard, progress.recent, progress.counts)
    counts_targets = recipe.training.loss_mean is LossMean.targets
    data_log = open_data_log(folder, topology, opened.plan(curriculum), progress, curriculum, counts_targets)
    checkpointing = Checkpointing(
        folder / CHECKPOINTS_FOLDER,
        recipe.checkpoint,
        topology,
        functools.partial(resumed.restore_random_states, topology),
        curriculum,
        guard,
        data_log,
        replicas_of(model),
        build_memory_writer(recipe, folder, topology, resumed),
        None if model.decoder.pipeline is None else model.decoder.pipeline.group,
        functools.partial(next_layout, recipe, curriculum),
    )
    recheck = None
    if recipe.guard.recheck_interval_batches is not None:
        report = functools.partial(report_found, records_folder(folder), topology)
        recheck = Recheck(recipe, model, topology, progress.batch, report, watch.move)
    alarms = Alarms(
        guard,
        Rollback(folder, recipe.guard, curriculum, topology, checkpointing.wait),
        documents_of(opened, curriculum),
        folder if topology.is_main else None,
    )
    return TrainingStep(recipe, model, topology, curriculum, alarms, data_log, checkpointing, recheck)


def build_memory_writer(
    recipe: Recipe, folder: Path, topology: Topology, resumed: Resumed
) -> MemoryWriter | None:
    """Builds what copies the state to the hosts' memory between saves, if the recipe asks for it."""
    if recipe.checkpoint.memory_interval_batches is None:
        return None
    token, made_by = run_on_rank_0(topology, lambda: (take_token(folder), secrets.token_hex(8)))
    last = resumed.progress.batch if resumed.memory is not None else None
    layout = layout_digest(recipe, topology.world_size)
    hosts = hosts_of_ranks(topology)
    return MemoryWriter(memory_folder(folder, token), topology, layout, made_by, hosts, last)


def report_found(folder: Path, topology: Topology, found: Corruption) -> None:
    """Records what a recheck has found; every rank calls it."""
    hosts = hosts_of_ranks(topology)
    suspects = {rank: hosts[rank] for rank in found.ranks}
    report_corruption(folder, topology, found.batch, found.line, suspects, is_persistent=found.is_persistent)


def open_data_log(
    folder: Path,
    topology: Topology,
    plan: OrderPlan,
    progress: Progress,
    curriculum: Curriculum,
    counts_targets: bool,
) -> DataLog:
    """Opens the data log with the totals of the checkpoint."""
    domains = [Domain(name, size) for name, size in zip(plan.domains, plan.sizes, strict=True)]
    run_dir = folder if topology.is_main else None
    return DataLog(run_dir, domains, curriculum.sample_tokens, progress.consumed, curriculum, counts_targets)


def suite_evaluation(
    opened: OpenedData, folder: Path, scorer: Scorer, batches: int, moved: Callable[[str], None]
) -> SuiteEvaluation:
    """Builds the evaluation of the recipe's task suite during training."""
    evaluation = opened.recipe.evaluation
    assert evaluation.suite is not None
    suite = load_suite(Path(evaluation.suite))
    bridge = hugging_face_tokenizer(opened.tokenizer)
    return SuiteEvaluation(scorer, suite, evaluation, bridge, folder, batches, moved)


def throughput(recipe: Recipe, machine: Machine, curriculum: Curriculum) -> Throughput:
    """Builds the throughput callback, with utilisation against the devices' measured peak."""
    flops = functools.partial(sizes.batch_flops_per_token, recipe.model, curriculum)
    peak = measured_peak_flops(machine.device_type, machine.matrix_dtype)
    return Throughput(flops, peak, machine.topology.world_size, machine.device_type == "cuda")


def bytes_per_token(shards: Manifest, split: str) -> dict[str, float]:
    """Mean bytes per token of each domain, to convert nats per token to bits per byte."""
    return {name: domain.splits[split].bytes_per_token for name, domain in shards.domains.items()}


def final_losses(trainer: Trainer, domains: list[str]) -> dict[str, float]:
    """Final validation loss of each domain in nats per token; collective, every rank calls it."""
    metrics = trainer.state.eval_metrics
    return {domain: metrics[f"validation/{domain}"]["token_loss"].compute().item() for domain in domains}


def finish(
    opened: OpenedData, folder: Path, machine: Machine, trainer: Trainer, losses: dict[str, float]
) -> None:
    """Logs the final losses and writes the run's summary and report; called on rank 0 only."""
    recipe, state, unigram_entropy = opened.recipe, trainer.state, validation_entropy(opened)
    for domain, loss in losses.items():
        log_on_rank_0(
            machine.topology,
            f"validation loss of {domain}: {loss:.3f} nats per token; unigram entropy of the same tokens: "
            f"{unigram_entropy[domain]:.3f}",
        )
    summary = Summary(
        name=recipe.name,
        batches=state.timestamp.batch.value,
        tokens=state.timestamp.token.value,
        seconds=state.timestamp.total_wct.total_seconds() if state.timestamp.total_wct else 0.0,
        validation_loss=losses,
        unigram_entropy=unigram_entropy,
        parameters_total=sizes.total_parameters(recipe.model),
        parameters_active=sizes.active_parameters(recipe.model),
        flops_per_token=sizes.training_flops(recipe).total / sizes.trained_tokens(recipe),
        peak_flops=measured_peak_flops(machine.device_type, machine.matrix_dtype),
        precision=machine.precision.value,
        devices=machine.topology.world_size,
        hardware=describe_hardware(machine.device_type, machine.topology.world_size),
        git_commit=provenance.git_commit(),
        packages=provenance.package_versions(),
        datasets=dataset_inputs(opened),
    )
    write_summary(folder, summary)
    if machine.topology.world_size == 1:
        write_sample(folder, unwrap(trainer).decoder, OwnText(opened.tokenizer))
    write_report(folder)


def unwrap(trainer: Trainer) -> LanguageModel:
    """Returns the trainer's model."""
    assert isinstance(trainer.state.model, LanguageModel)
    return trainer.state.model


def dataset_inputs(opened: OpenedData) -> list[DatasetInput]:
    """Lists the splits that a run reads, with their content hashes."""
    recipe, shards = opened.recipe, opened.manifest
    contexts = {"train": "training", "validation": "validation"}
    read = [(domain, split) for domain in domains_of(recipe) for split in contexts]
    read += [(domain, "validation") for domain in recipe.data.validation_domains]
    return [
        DatasetInput(
            name=f"{domain}/{split}",
            digest=shards.domains[domain].splits[split].content_sha256,
            source=recipe.data.shards,
            tokens=shards.domains[domain].splits[split].tokens,
            context=contexts[split],
            facts=shards.domains[domain].facts,
        )
        for domain, split in read
    ]
