"""The training step, in the order of the loop: one callback that Composer's Trainer calls as it goes.

=========  ==========================================================================  ==================
data in    skip excluded batches; set RoPE base, microbatch size and learning rate     `after_dataloader`,
                                                                                       `batch_start`
count      the batch's targets and its expert choices, if its losses need them         `before_train_batch`
forward    Composer's; then add each microbatch's loss, expert and domain counts       `after_loss`
backward   Composer's; FSDP2 averages the gradients of sharded weights over ranks      `before_backward`
reduce     sum the batch's loss, counts and save flags over ranks; average the         `after_train_batch`
           routers' gradients
clip       clip gradients to a global norm                                             `after_train_batch`
recheck    run the step again and compare bit for bit, if it is time or the guard      `after_train_batch`
           would raise an alarm
guard      decide from loss, norm and router load whether to apply the update          `after_train_batch`
update     update the router bias; Composer then calls `optimizer.step()`              `after_train_batch`
log        record which data the batch consisted of                                    `batch_end`
save       save a checkpoint, if one is due                                            `batch_checkpoint`
=========  ==========================================================================  ==================

With a pipeline, Composer's forward pass of the whole batch runs all forward and backward passes of its
microbatches (:mod:`train.step.pipelined`), and adds them up.

This is the only callback that changes training; the others watch and record.
"""

from collections.abc import Sequence

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor

from train.layout.mesh import reduce_gradients
from train.layout.optim import average_replicated_gradients, clip_gradients, sum_over_ends
from train.model.router import bias_step, update_bias
from train.model.scaled_products import require_ran
from train.recipe import sizes
from train.recipe.curriculum import Curriculum
from train.recipe.phases import microbatch_sequences, phases_of, training_in
from train.recipe.schema import Balance, ExpertPrecision, LossMean, Recipe
from train.recipe.topology import Topology
from train.record.metrics import GRADIENT_NORM, LARGEST_LOGIT, LEARNING_RATE, PHASE
from train.step.alarms import Alarms
from train.step.balance import BalanceCounts, microbatches_of
from train.step.batch_sums import BatchSums, BatchTotals, targets_per_sequence
from train.step.checkpointing import Checkpointing
from train.step.data_in import learning_rate, skip_excluded
from train.step.data_log import DataLog
from train.step.domain_counts import DomainCounts
from train.step.language_model import LanguageModel
from train.step.microbatch import Batch
from train.step.pipelined import PipelinedBatch
from train.step.recheck import CorruptionError, Recheck


class TrainingStep(Callback):
    """The parts of a step around Composer's passes and optimizer; see the module's table.

    Args:
        recipe: the run's recipe.
        model: the model to train, already sharded and on its device.
        topology: this rank.
        curriculum: the run's stages and excluded ranges.
        alarms: judges each update, identically on every rank; None: every update is applied.
        data_log: records the data of each step; None: no counts by domain.
        checkpointing: saves checkpoints; None: nothing is saved.
        recheck: finds silent corruption; None: no step runs again.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: LanguageModel,
        topology: Topology,
        curriculum: Curriculum,
        alarms: Alarms | None = None,
        data_log: DataLog | None = None,
        checkpointing: Checkpointing | None = None,
        recheck: Recheck | None = None,
    ) -> None:
        self.recipe, self.model, self.topology, self.curriculum = recipe, model, topology, curriculum
        self.alarms, self.data_log, self.checkpointing = alarms, data_log, checkpointing
        self.recheck = recheck
        phases, layers = phases_of(recipe), sizes.layers(recipe.model)
        self.microbatches = [microbatch_sequences(recipe, phase) for phase in phases]
        self.recomputed = [sizes.recomputed(training_in(recipe, phase), layers) for phase in phases]
        """Sequences per microbatch, by phase."""
        moe = recipe.model.moe
        self.balance: BalanceCounts | None = None
        if moe is not None and moe.balance is not Balance.bias:
            most = sizes.most_microbatches(recipe, topology.world_size)
            self.balance = BalanceCounts(model, moe.balance_scope, most)
        self.bias_step = bias_step(moe) if moe is not None and moe.balance is not Balance.loss else None
        device = next(model.parameters()).device
        context, pipeline, domains = model.decoder.context, model.decoder.pipeline, None
        if data_log is not None:
            # Of the ranks that work on a sequence, one counts it.
            counts = (context is None or context.rank == 0) and (pipeline is None or pipeline.is_last)
            domains = DomainCounts(len(data_log.domains), device, counts)
        self.sums = BatchSums(domains, recipe.parallelism.on_each_sequence)
        self.pipelined: PipelinedBatch | None = None
        if pipeline is not None:
            self.pipelined = PipelinedBatch(model, recipe.parallelism, self.sums.add)
            model.pipelined = self.pipelined.run
        self.totals: BatchTotals | None = None
        """Totals of the last complete batch."""
        self._saves: list[bool] = []
        """The flags that the ranks agreed on with the batch's sums: :meth:`Checkpointing.flags`."""
        self._reduced = (0.0, 0.0)
        """Loss and gradient norm of the last run of a step."""
        self._awaits_experts = recipe.training.expert_precision is not ExpertPrecision.same
        """No batch has shown yet in which kernels the experts run."""
        self._passes_left = 0
        """Backward passes of this batch that have not begun."""

    def expert_tokens(self) -> Tensor | None:
        """Tokens per expert of the last batch over all ranks, int64 [L, E]; None for a dense model."""
        return None if self.totals is None else self.totals.expert_tokens_LE

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drops log lines of batches that will be trained again, and listens for SIGTERM and Ctrl-C."""
        batch = state.timestamp.batch.value
        if self.alarms is not None:
            self.alarms.drop_after(batch)
        if self.data_log is not None:
            self.data_log.drop_after(batch)
        if self.checkpointing is not None:
            self.checkpointing.listen()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Data in: moves the clock past excluded batches, which the loader has skipped."""
        skip_excluded(state, self.curriculum, self.topology.is_main)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Data in: applies the curriculum's settings, which depend only on the batch number."""
        batch = state.timestamp.batch.value
        stage = self.curriculum.stage_of(batch)
        self.model.decoder.set_rope_theta(stage.rope_theta)
        self.model.decoder.set_recompute(self.recomputed[stage.phase])
        if self.pipelined is not None:
            self.pipelined.microbatch_sequences = self.microbatches[stage.phase]
        state.device_train_microbatch_size = self.microbatches[stage.phase]
        rate = learning_rate(self.recipe, self.curriculum, batch)
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate * group["lr_scale"]
        logger.log_metrics({PHASE: stage.phase, LEARNING_RATE: rate})
        if self.checkpointing is not None:
            self.checkpointing.restore_random_states()

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Count: targets of all ranks; routes the whole batch without gradients for the balance loss."""
        if self.recheck is not None:
            self.recheck.begin(state.timestamp.batch.value, state.optimizers[0])
        if self.balance is not None and self.balance.needs_first_pass:
            self.balance.count_batch(microbatches_of(state))
        if self.recipe.training.loss_mean is LossMean.targets:
            device = next(self.model.parameters()).device
            self.model.targets_per_sequence = targets_per_sequence(state.batch["targets"].to(device))
        self.sums.clear()
        self.model.decoder.forget_logits()
        assert state.device_train_microbatch_size is not None
        sequences = state.batch["input_ids"].shape[0]
        self._passes_left = -(-sequences // int(state.device_train_microbatch_size))

    def after_loss(self, state: State, logger: Logger) -> None:
        """Forward: adds a microbatch's loss and counts; its backward pass follows."""
        assert isinstance(state.loss, dict)
        if self.pipelined is None:  # which adds its microbatches itself
            self.sums.add(state.batch, state.outputs, state.loss["language"])

    def before_backward(self, state: State, logger: Logger) -> None:
        """Backward: says whether this is the batch's last pass, after which gradients are reduced."""
        if self.pipelined is not None:  # its passes are done
            return
        self._passes_left -= 1
        reduce_gradients(self.model.decoder, self.recipe.parallelism, after_this_pass=self._passes_left == 0)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Reduce, clip, recheck, guard, update: between the last backward pass and `optimizer.step()`."""
        if self._awaits_experts:
            self._awaits_experts = False
            require_ran(self.recipe.training.expert_precision, next(self.model.parameters()).device.type)
        saves = [] if self.checkpointing is None else self.checkpointing.flags()
        loss, norm, raised = self._reduce([*saves, *([self.recheck.has_changed] if self.recheck else [])])
        self._saves = raised[: len(saves)]
        if self.recheck is not None:
            loss, norm = self._recheck(self.recheck, state, loss, norm, has_changed=raised[-1])
        totals = self.totals
        assert totals is not None
        logger.log_metrics({GRADIENT_NORM: norm})
        if not self._is_applied(state, totals, loss, norm):
            # Optimizers neither update nor decay a weight without a gradient.
            self.model.zero_grad(set_to_none=True)
        elif self.bias_step is not None:
            assert totals.expert_tokens_LE is not None
            own = [layer for layers in self.model.expert_layers for layer in layers]
            update_bias(self.model.decoder, totals.expert_tokens_LE[own], self.bias_step)

    def run_again(self, parts: Sequence[Batch]) -> None:
        """Computes sums and clipped gradients of a batch in place of those that are there.

        Args:
            parts: this rank's microbatches, on the device.
        """
        self.model.zero_grad(set_to_none=True)
        self.sums.clear()
        self.model.decoder.forget_logits()
        if self.balance is not None:
            self.balance.count_batch(parts)
        sequences = sum(len(part["input_ids"]) for part in parts)
        for number, part in enumerate(parts, start=1):
            outputs = self.model(part)
            losses = self.model.loss(outputs, part)
            self.sums.add(part, outputs, losses["language"])
            reduce_gradients(
                self.model.decoder, self.recipe.parallelism, after_this_pass=number == len(parts)
            )
            # As Composer weighs a microbatch.
            (losses["total"] * (len(part["input_ids"]) / sequences)).backward()
        self._reduced = self._reduce([])[:2]

    def _reduce(self, flags: Sequence[bool | Tensor]) -> tuple[float, float, list[bool]]:
        """Reduces and clips; returns loss, norm before clipping, and whether any rank raised each flag."""
        totals = self.totals = self.sums.reduce(flags)
        pipeline = self.model.decoder.pipeline
        average_replicated_gradients(self.model.parameters(), None if pipeline is None else pipeline.peers)
        if pipeline is not None and (embedding := self.model.decoder.shared_embedding) is not None:
            assert pipeline.ends is not None
            sum_over_ends(embedding, pipeline.ends)
        norm = self.clip()
        # Read together, since each read waits for the device.
        loss, read_norm, *raised = torch.stack([totals.loss, norm.to(totals.loss), *totals.flags]).tolist()
        return loss, read_norm, [ranks > 0 for ranks in raised]

    def _recheck(
        self, recheck: Recheck, state: State, loss: float, norm: float, *, has_changed: bool
    ) -> tuple[float, float]:
        """Runs the step again if it is time; returns loss and norm of the run that counts.

        Raises:
            CorruptionError: if a machine computes wrongly again and again.
        """
        batch, self._reduced = state.timestamp.batch.value, (loss, norm)
        found = None
        if has_changed:
            found = recheck.find_changed(batch)
        elif recheck.is_due(batch) or self._would_alarm(loss, norm):
            parts = microbatches_of(state)
            found = recheck.compare(batch, parts, lambda: self.sums.losses, self.run_again)
        if found is not None and found.is_persistent:
            if self.checkpointing is not None:
                self.checkpointing.set_aside_after(found.sound_until)
            raise CorruptionError(found.line)
        return self._reduced

    def _would_alarm(self, loss: float, norm: float) -> bool:
        assert self.totals is not None
        return self.alarms is not None and self.alarms.would_alarm(self.totals, loss, norm)

    def clip(self) -> Tensor:
        """Clip: scales the batch's gradients, and returns their global norm before it."""
        with torch.no_grad():
            limit, stages = self.recipe.training.clip_norm, self.recipe.parallelism.pipeline
            twice = self.model.decoder.shared_embedding
            return clip_gradients(self.model.parameters(), limit, stages, twice)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log: records the batch, and what the update left; the clock has already advanced past it."""
        if (largest := self.model.decoder.largest_logit) is not None:
            logger.log_metrics({LARGEST_LOGIT: largest.item()})
        if self.data_log is not None:
            assert self.totals is not None
            logger.log_metrics(self.data_log.record(state.timestamp.batch.value, self.totals))
        if self.recheck is not None:
            self.recheck.end(state.optimizers[0])

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save: saves a checkpoint if one is due, and ends the run after a SIGTERM or Ctrl-C."""
        if self.checkpointing is not None:
            self.checkpointing.save_if_due(state, *self._saves)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Saves the final checkpoint."""
        if self.checkpointing is not None:
            self.checkpointing.save_end(state)

    def close(self, state: State, logger: Logger) -> None:
        """Closes the log files and waits for a checkpoint that is still being written."""
        if self.alarms is not None:
            self.alarms.close()
        if self.data_log is not None:
            self.data_log.close()
        if self.checkpointing is not None:
            self.checkpointing.close()

    def _is_applied(self, state: State, totals: BatchTotals, loss: float, norm: float) -> bool:
        """Returns whether the guard applies the update; raises if it ends the run."""
        if self.alarms is None:
            return True
        batch, first = state.timestamp.batch.value, state.timestamp.sample.value
        positions = totals.tokens // self.curriculum.sample_tokens
        return self.alarms.is_applied(batch, first, positions, totals, loss, norm)
