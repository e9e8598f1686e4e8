"""Several ranks: placement of weights, saves when one rank fails, SIGTERM and Ctrl-C."""

import json
import os
import resource
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from composer import Timestamp
from torch import nn
from torch.distributed.tensor import DTensor

from launch.verify.forked_ranks import RankError, Ranks, run_ranks
from tests.fake_world import CFG, local, sharded, whole
from train.checkpoint.files import (
    Progress,
    check_checkpoint,
    newest_whole_checkpoint,
    restore_random_states,
    writing_ranks,
)
from train.checkpoint.loading import load_checkpoint
from train.checkpoint.saver import CheckpointSaver
from train.health.collectives import CollectiveRecorder, recorded_collectives
from train.layout.mesh import build_mesh, build_sharded, replicas_of
from train.layout.optim import average_replicated_gradients, build_optimizer, clip_gradients
from train.model.decoder import Decoder, DecoderOutput
from train.model.init import initialize
from train.recipe import sizes
from train.recipe.curriculum import Curriculum
from train.recipe.errors import UserError
from train.recipe.schema import Checkpoint, Moe, Optimizer, Parallelism, Precision, Recompute
from train.recipe.topology import Topology
from train.step.batch_sums import BatchSums
from train.step.checkpointing import Checkpointing

pytestmark = pytest.mark.slow

LAYOUT = Parallelism(replicate=2, expert=2)
FINE = 2.0**-20  # lost in bf16
CFG_LARGE = replace(CFG, d_model=128, vocab_size=256, moe=Moe(experts=16, top_k=2))


def _decoder(topology: Topology, layout: Parallelism) -> Decoder:
    decoder = Decoder(CFG, device="meta")
    build_sharded(decoder, build_mesh(layout, topology.world_size, "cpu"), Precision.fp32, 17)
    return decoder


def test_experts_rows_that_ranks_do_not_divide_are_sharded_or_refused_in_a_line() -> None:
    refused = []
    try:
        with sharded(replace(CFG, ffn_hidden_size=25), Parallelism(expert=4), 12, rank=11) as decoder:
            rows = local(decoder.get_parameter("transformer.blocks.0.ffn.experts.mlp.w1")).shape[0]
            assert rows == 2 * 25 - 2 * 17  # the last of three shards of two experts
    except UserError as error:
        refused = [str(error)]
    assert bool(refused) == torch.__version__.startswith("2.7.")
    assert all("cuts the experts' 200 rows for 12 ranks unevenly" in line for line in refused)


@pytest.mark.parametrize("layout", [LAYOUT, Parallelism(expert=4), Parallelism()])
def test_initial_weights_do_not_depend_on_the_layout_and_no_rank_holds_them_all(layout: Parallelism) -> None:
    expected = Decoder(CFG)
    initialize(expected, CFG, 17)

    def work(topology: Topology) -> dict[str, int]:
        held = {}
        for name, parameter in _decoder(topology, layout).named_parameters():
            held[name] = local(parameter).numel()
            assert isinstance(parameter, DTensor) != (".router." in name)
            assert torch.equal(whole(parameter), expected.get_parameter(name)), name
        return held

    for rank, held in enumerate(run_ranks(4, work)):
        assert held == sizes.rank_weights(CFG, layout, 4, rank)
        assert sum(held.values()) < 0.6 * sizes.total_parameters(CFG)


class Reductions(CollectiveRecorder):
    """Keeps what FSDP2 asks for when it reduces gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.are_sums: list[bool] = []

    def note(self, group: Any, operation: str, arguments: tuple[Any, ...]) -> Any:
        self.are_sums += [a.reduceOp == dist.ReduceOp.SUM for a in arguments if hasattr(a, "reduceOp")]
        return super().note(group, operation, arguments)


def test_on_a_cpu_gradients_are_summed_since_not_every_gloo_averages() -> None:
    def work(topology: Topology) -> set[bool]:
        decoder, ids_BS = _decoder(topology, LAYOUT), torch.arange(8).view(1, 8)
        reductions = Reductions()
        with recorded_collectives(reductions):
            decoder(ids_BS, None, ids_BS).loss_sum.backward()
        return set(reductions.are_sums)

    assert run_ranks(4, work) == [{True}] * 4


def _save(
    topology: Topology,
    root: Path,
    batch: int,
    limited_rank: int | None,
    keep_last: int = 1,
    by_one_replica: bool = False,
) -> str | None:
    """Saves while one rank can't write more than a few bytes, as on a full disk; None if it writes none."""
    decoder = _decoder(topology, LAYOUT)
    optimizer = build_optimizer(decoder, Optimizer(learning_rate=0.01))
    saver = CheckpointSaver(root, topology, keep_last, replicas_of(decoder) if by_one_replica else None)
    dist.barrier()
    if topology.rank == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
    saver.start(decoder, optimizer, Progress(batch, batch * 8, batch * 64, 1.0))
    saved = saver.wait()
    if saved is None:
        return None
    assert saved.batch == batch
    return saved.error


@pytest.mark.parametrize(("by_one_replica", "full_rank"), [(False, 2), (True, 3), (True, 0)])
def test_a_full_disk_at_one_rank_ends_the_save_on_all_and_spares_the_one_before(
    by_one_replica: bool, full_rank: int, tmp_path: Path
) -> None:
    def save(topology: Topology) -> tuple[str | None, str | None]:
        saved = partial(_save, topology, tmp_path, by_one_replica=by_one_replica)
        return saved(batch=1, limited_rank=None), saved(batch=2, limited_rank=full_rank)

    whole, later = zip(*run_ranks(4, save), strict=True)
    assert whole == (("", None, None, "") if by_one_replica else ("",) * 4)
    (error,) = {error for error in later if error is not None}
    assert f"rank {full_rank}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["batch-00000001"]
    found, complaints = newest_whole_checkpoint(tmp_path)
    assert found is not None and not complaints

    def load(topology: Topology) -> int:
        decoder = _decoder(topology, Parallelism(expert=2))
        optimizer = build_optimizer(decoder, Optimizer(learning_rate=0.01))
        return load_checkpoint(found, decoder, optimizer, topology).batch

    assert run_ranks(2, load) == [1, 1]


def test_one_rank_of_each_shard_writes_it_with_the_random_states_of_all(tmp_path: Path) -> None:
    def save(topology: Topology) -> list[int]:
        torch.manual_seed(topology.rank)
        assert _save(topology, tmp_path, 1, 2, by_one_replica=True) in ("", None)
        return torch.get_rng_state().tolist()

    drawn = run_ranks(4, save)
    folder = tmp_path / "batch-00000001"
    assert sorted(file.name for file in (folder / "state").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    ]
    check_checkpoint(folder)
    for rank, state in enumerate(drawn):
        assert json.loads((folder / f"rank-{rank}.json").read_text())["torch"] == state

    def load(topology: Topology) -> bool:
        decoder, expected = _decoder(topology, LAYOUT), Decoder(CFG)
        initialize(expected, CFG, 17)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.zero_()
        optimizer = build_optimizer(decoder, Optimizer(learning_rate=0.01))
        load_checkpoint(folder, decoder, optimizer, topology)
        assert restore_random_states(folder, topology)
        assert torch.get_rng_state().tolist() == drawn[topology.rank]
        pairs = decoder.named_parameters()
        return all(torch.equal(whole(tensor), expected.get_parameter(name)) for name, tensor in pairs)

    assert run_ranks(4, load) == [True] * 4


@pytest.mark.parametrize(("world", "replicas"), [(8, 1), (8, 2), (24, 3), (3072, 24)])
def test_the_writers_hold_every_shard_once_on_as_many_nodes_as_possible(world: int, replicas: int) -> None:
    writers, size = writing_ranks(world, replicas), world // replicas
    assert [rank % size for rank in writers] == list(range(size)) and writers[0] == 0
    assert len({rank // 8 for rank in writers}) == min(size, world // 8)


def test_ranks_find_damage_together_and_agree_on_the_checkpoint(tmp_path: Path) -> None:
    def save(topology: Topology) -> list[str | None]:
        return [_save(topology, tmp_path, batch, None, keep_last=2) for batch in (1, 2)]

    assert run_ranks(4, save) == [["", ""]] * 4
    file = tmp_path / "batch-00000002" / "state" / "__3_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for found, complaints in run_ranks(3, lambda topology: newest_whole_checkpoint(tmp_path, topology)):
        assert found == tmp_path / "batch-00000001"
        assert len(complaints) == 1 and "__3_0.distcp" in complaints[0]


STAGES = Curriculum((), 64)
"""Irrelevant to when a checkpoint is due."""


def _agreed(callback: Checkpointing) -> tuple[float, list[bool]]:
    """The mean loss over the ranks, and what they agree on with it; nothing else may be asked of them."""
    sums, zero = BatchSums(None), torch.zeros(())
    outputs = DecoderOutput(None, zero, zero, None, torch.zeros(0, 0), zero, torch.zeros(0, 0), zero, zero)
    sums.add({"input_ids": torch.zeros(1, 8)}, outputs, torch.tensor(2.0 + dist.get_rank()))
    with recorded_collectives() as asked:
        totals = sums.reduce(callback.flags())
        flags = [ranks > 0 for ranks in totals.flags.tolist()]
        if not any(flags):
            callback.save_if_due(SimpleNamespace(timestamp=Timestamp(batch=3)), *flags)  # type: ignore[arg-type]
        assert asked.progress() == 1
    return totals.loss.item(), flags


@pytest.mark.parametrize("late_rank", [0, 1])
def test_the_main_ranks_clock_decides_for_all(late_rank: int, tmp_path: Path) -> None:
    def work(topology: Topology) -> tuple[float, list[bool]]:
        callback = Checkpointing(tmp_path, Checkpoint(interval_minutes=1.0), topology, None, STAGES)
        callback.last_save -= 3600.0 if topology.rank == late_rank else 0.0
        return _agreed(callback)

    assert run_ranks(2, work) == [(2.5, [late_rank == 0, False])] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("told_rank", [0, 1])
def test_a_signal_to_one_rank_counts_for_all(told_rank: int, number: signal.Signals, tmp_path: Path) -> None:
    def work(topology: Topology) -> list[tuple[float, list[bool]]]:
        callback = Checkpointing(tmp_path, Checkpoint(), topology, None, STAGES)
        callback.listen()
        before = _agreed(callback)
        if topology.rank == told_rank:
            os.kill(os.getpid(), number)
        return [before, _agreed(callback)]

    assert run_ranks(2, work) == [[(2.5, [False, False]), (2.5, [False, True])]] * 2


def test_ctrl_c_twice_ends_at_once_and_composers_sigterm_after_it_does_not(tmp_path: Path) -> None:
    def work(topology: Topology) -> None:
        callback = Checkpointing(tmp_path, Checkpoint(), topology, None, STAGES)
        callback.listen()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert callback.flags() == [False, True]
        (tmp_path / "told").touch()
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it lives on")

    with Ranks(1, work, tmp_path / "log") as processes:
        assert processes.exit_codes(60) == [-signal.SIGINT]
    assert (tmp_path / "told").exists()


def test_a_rank_of_a_large_job_is_in_one_group_per_dimension_and_in_no_other_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    new_group = dist.new_group

    def faked(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        # The saver's is gloo's, which can't be had without the other ranks.
        return new_group(ranks, *args, **kwargs | {"backend": "fake"})

    monkeypatch.setattr(dist, "new_group", faked)

    def groups(layout: Parallelism, world: int, rank: int) -> list[int]:
        def work(_alone: Topology) -> list[int]:
            topology = Topology(rank, world, rank % 8, 8)
            with sharded(CFG_LARGE, layout, world, rank) as decoder:
                Checkpointing(tmp_path, Checkpoint(), topology, None, STAGES, replicas=replicas_of(decoder))
                return [group.size() for group in dist.distributed_c10d._world.pg_map]

        return run_ranks(1, work)[0]  # in a process of its own, as torch keeps meshes

    dbrx = Parallelism(replicate=24, expert=16)
    assert groups(dbrx, 3072, rank=0) == [3072, 24, 8, 16, 128, 128]
    assert groups(dbrx, 3072, rank=3071) == [3072, 24, 8, 16, 128], "it writes no checkpoint"
    assert groups(Parallelism(expert=8), 64, rank=63) == [64, 8, 8, 64]
    assert groups(Parallelism(), 64, rank=63) == [64, 64, 64]
    assert groups(Parallelism(context=2), 64, rank=63) == [64, 64, 2, 64]


def test_a_rank_that_fails_is_reported_with_its_traceback_and_ends_the_others() -> None:
    def work(topology: Topology) -> None:
        if topology.rank == 1:
            raise ValueError("as planned")
        dist.barrier()

    with pytest.raises(RankError, match=r"rank 1 of 2(.|\n)*as planned"):
        run_ranks(2, work)


def test_a_rank_that_hangs_is_killed() -> None:
    def work(topology: Topology) -> None:
        if topology.rank == 0:
            dist.barrier()
        else:
            while True:
                pass

    with Ranks(2, work) as ranks:
        with pytest.raises(RankError, match="took over"):
            ranks.results(timeout_seconds=1.0)
        assert not ranks.are_running


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_recomputed_layers_give_the_kept_ones_gradients_when_sharded(precision: Precision) -> None:
    """FSDP2 casts a layer's inputs in the forward pass; before torch 2.13 not in recomputation."""

    def work(topology: Topology) -> list[tuple[Recompute, str]]:
        """Returns what differs from the gradients of kept layers."""
        cfg = replace(CFG, n_layers=2)
        found, different = [], []
        for grades in ([Recompute.nothing] * 2, *([grade, Recompute.gates] for grade in Recompute)):
            decoder = Decoder(cfg, device="meta", recompute=grades)
            build_sharded(decoder, build_mesh(Parallelism(expert=2), 2, "cpu"), precision, 17)
            ids_BS = (torch.arange(8).view(1, 8) + topology.rank) % cfg.vocab_size
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
                decoder(ids_BS, None, ids_BS).loss_sum.backward()
            gradients = {name: local(p.grad) for name, p in decoder.named_parameters() if p.grad is not None}
            assert len(gradients) == len(list(decoder.parameters()))
            found.append(gradients)
            same = [name for name, gradient in gradients.items() if torch.equal(gradient, found[0][name])]
            different += [(grades[0], name) for name in gradients if name not in same]
        return different

    assert run_ranks(2, work) == [[], []]


class Gathers(CollectiveRecorder):
    """Counts all-gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def note(self, group: Any, operation: str, arguments: tuple[Any, ...]) -> Any:
        # The method's name is another from torch 2.8 on.
        self.count += operation in ("allgather_base", "all_gather_single")
        return super().note(group, operation, arguments)


@pytest.mark.parametrize("recomputed", [Recompute.nothing, Recompute.gates, Recompute.ffn, Recompute.layer])
def test_weights_are_gathered_a_layer_ahead_in_both_directions(recomputed: Recompute) -> None:
    """Two units a layer, of which none is gathered more than twice, and the embeddings'."""
    layers = 4

    def work(topology: Topology) -> tuple[list[int], list[int], int]:
        cfg = replace(CFG, n_layers=layers)
        decoder = Decoder(cfg, device="meta", recompute=recomputed)
        build_sharded(decoder, build_mesh(Parallelism(), 2, "cpu"), Precision.fp32, 17)
        gathers, forward, backward = Gathers(), [], []

        def entered(_experts: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            if torch._C._current_graph_task_id() == -1:  # not in recomputation
                forward.append(gathers.count)
                output.register_hook(lambda _gradient: backward.append(gathers.count))

        for block in decoder.transformer.blocks:
            block.ffn.experts.register_forward_hook(entered)  # type: ignore[union-attr]
        ids_BS = torch.arange(8).view(1, 8) % CFG.vocab_size
        with recorded_collectives(gathers):
            decoder(ids_BS, None, ids_BS).loss_sum.backward()
        return forward, backward, gathers.count

    in_forward = [1 + 2 * min(layer + 2, layers) for layer in range(layers)]
    in_backward = [1 + 2 * layers + 2 * min(done + 2, layers) for done in range(layers)]
    assert run_ranks(2, work) == [(in_forward, in_backward, 1 + 4 * layers)] * 2


@pytest.mark.parametrize("layout", [LAYOUT, Parallelism()])
def test_the_norm_counts_every_weight_once_whoever_holds_it(layout: Parallelism) -> None:
    def work(topology: Topology) -> tuple[float, float]:
        decoder = _decoder(topology, layout)
        for parameter in decoder.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + topology.rank + FINE)
        average_replicated_gradients(decoder.parameters())
        (router,) = (p for name, p in decoder.named_parameters() if ".router." in name)
        assert router.grad is not None and set(router.grad.flatten().tolist()) == {2.5 + FINE}, (
            "the mean of 1 to 4"
        )
        for parameter in decoder.parameters():
            parameter.grad = torch.ones_like(parameter)
        norm = clip_gradients(decoder.parameters(), 1.0).item()
        return norm, router.grad.max().item()

    norm = sizes.total_parameters(CFG) ** 0.5
    for found, scaled in run_ranks(4, work):
        assert found == pytest.approx(norm, rel=1e-6) and scaled == pytest.approx(1 / norm, rel=1e-5)
