"""Several ranks: placement of weights, saves when one rank fails, and SIGTERM."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from launch.verify.forked_ranks import RankError, Ranks, run_ranks
from train.checkpoint.files import Progress, load_checkpoint, newest_whole_checkpoint
from train.checkpoint.saver import CheckpointSaver
from train.health.collectives import CollectiveRecorder, recorded_collectives
from train.layout.mesh import build_mesh, build_sharded
from train.layout.optim import build_optimizer, clip_gradients
from train.model.decoder import Decoder
from train.model.init import initialize
from train.recipe import sizes
from train.recipe.curriculum import Curriculum
from train.recipe.schema import Checkpoint, Model, Moe, Optimizer, Parallelism, Precision
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

CFG = Model(
    d_model=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    ffn_hidden_size=24,
    vocab_size=33,
    max_sequence_tokens=8,
    moe=Moe(experts=8, top_k=2),
)
LAYOUT = Parallelism(replicate=2, expert=2)


def _decoder(topology: Topology, layout: Parallelism) -> Decoder:
    decoder = Decoder(CFG, device="meta")
    build_sharded(decoder, build_mesh(layout, topology.world_size, "cpu"), Precision.fp32, 17)
    return decoder


@pytest.mark.parametrize("layout", [LAYOUT, Parallelism(expert=4), Parallelism()])
def test_initial_weights_do_not_depend_on_the_layout_and_no_rank_holds_them_all(layout: Parallelism) -> None:
    whole = Decoder(CFG)
    initialize(whole, CFG, 17)

    def work(topology: Topology) -> dict[str, int]:
        held = {}
        for name, parameter in _decoder(topology, layout).named_parameters():
            assert isinstance(parameter, DTensor)
            held[name] = parameter.to_local().numel()
            assert torch.equal(parameter.full_tensor(), whole.get_parameter(name)), name
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


def _save(topology: Topology, root: Path, batch: int, limited_rank: int | None, keep_last: int = 1) -> str:
    """Saves while one rank can't write more than a few bytes, as on a full disk."""
    decoder = _decoder(topology, LAYOUT)
    optimizer = build_optimizer(decoder, Optimizer(learning_rate=0.01))
    saver = CheckpointSaver(root, topology, keep_last)
    dist.barrier()
    if topology.rank == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
    saver.start(decoder, optimizer, Progress(batch, batch * 8, batch * 64, 1.0))
    saved = saver.wait()
    assert saved is not None and saved.batch == batch
    return saved.error


def test_a_full_disk_at_one_rank_ends_the_save_on_all_and_spares_the_one_before(tmp_path: Path) -> None:
    assert run_ranks(4, lambda topology: _save(topology, tmp_path, 1, None)) == [""] * 4
    errors = run_ranks(4, lambda topology: _save(topology, tmp_path, 2, limited_rank=2))
    assert len(set(errors)) == 1 and "rank 2" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["batch-00000001"]
    found, complaints = newest_whole_checkpoint(tmp_path)
    assert found is not None and not complaints

    def load(topology: Topology) -> int:
        decoder = _decoder(topology, Parallelism(expert=2))
        optimizer = build_optimizer(decoder, Optimizer(learning_rate=0.01))
        return load_checkpoint(found, decoder, optimizer, topology).batch

    assert run_ranks(2, load) == [1, 1]


def test_ranks_find_damage_together_and_agree_on_the_checkpoint(tmp_path: Path) -> None:
    whole = run_ranks(4, lambda topology: _save(topology, tmp_path, 1, None, keep_last=2))
    newer = run_ranks(4, lambda topology: _save(topology, tmp_path, 2, None, keep_last=2))
    assert whole == newer == [""] * 4
    file = tmp_path / "batch-00000002" / "state" / "__3_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for found, complaints in run_ranks(3, lambda topology: newest_whole_checkpoint(tmp_path, topology)):
        assert found == tmp_path / "batch-00000001"
        assert len(complaints) == 1 and "__3_0.distcp" in complaints[0]


STAGES = Curriculum((), 64)
"""Irrelevant to when a checkpoint is due."""


@pytest.mark.parametrize("late_rank", [0, 1])
def test_the_main_ranks_clock_decides_for_all(late_rank: int, tmp_path: Path) -> None:
    from train.step.checkpointing import Checkpointing

    def work(topology: Topology) -> tuple[bool, bool]:
        callback = Checkpointing(tmp_path, Checkpoint(interval_minutes=1.0), topology, None, STAGES)
        callback.last_save -= 3600.0 if topology.rank == late_rank else 0.0
        return callback._agree()

    assert run_ranks(2, work) == [(late_rank == 0, False)] * 2


@pytest.mark.parametrize("told_rank", [0, 1])
def test_a_signal_to_one_rank_counts_for_all(told_rank: int, tmp_path: Path) -> None:
    from train.step.checkpointing import Checkpointing

    def work(topology: Topology) -> tuple[bool, bool]:
        callback = Checkpointing(tmp_path, Checkpoint(), topology, None, STAGES)
        signal.signal(signal.SIGTERM, callback._terminate)
        if topology.rank == told_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return callback._agree()

    assert run_ranks(2, work) == [(False, True)] * 2


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

    def work(topology: Topology) -> list[float]:
        norms = []
        for recomputed in (False, True):
            decoder = Decoder(CFG, device="meta", activation_checkpointing=recomputed)
            build_sharded(decoder, build_mesh(Parallelism(expert=2), 2, "cpu"), precision, 17)
            ids_BS = torch.arange(8).view(1, 8) % CFG.vocab_size
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
                decoder(ids_BS, None, ids_BS).loss_sum.backward()
            norms.append(clip_gradients(decoder.parameters(), None).item())
        return norms

    for kept, recomputed in run_ranks(2, work):
        assert recomputed == pytest.approx(kept, rel=1e-6) and kept > 0
