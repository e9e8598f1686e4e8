"""A pipeline's stages have the weights of one process, and save what one process reads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.verify.forked_ranks import run_ranks
from tests.fake_world import CFG, whole
from train.checkpoint.files import STATE_FOLDER, Progress
from train.checkpoint.groups import hyperparameters_of, read_hyperparameters
from train.checkpoint.loading import load_checkpoint
from train.checkpoint.saver import CheckpointSaver
from train.evaluate.scorer import Scorer
from train.layout.mesh import build_mesh, build_sharded, replicas_of
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.model.init import initialize
from train.recipe import sizes
from train.recipe.schema import Model, Optimizer, Parallelism, Precision
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

MODEL = replace(CFG, n_layers=3, mtp=True)
"""Its last stage has the embedding, too."""
LAYOUT = Parallelism(replicate=2, pipeline=2, pipeline_layers=[2, 1])
ADAMW = Optimizer(learning_rate=0.01)


def _stage(topology: Topology, layout: Parallelism, seed: int, model: Model = MODEL) -> Decoder:
    _, stage, _ = sizes.place_of(layout, topology.world_size, topology.rank)
    decoder = Decoder(model, device="meta", parts=sizes.stage_parts(model, layout, stage))
    build_sharded(decoder, build_mesh(layout, topology.world_size, "cpu"), Precision.fp32, seed)
    return decoder


@pytest.mark.parametrize(
    "layout", [LAYOUT, Parallelism(pipeline=2, expert=2), Parallelism(pipeline=3, pipeline_chunks=1)]
)
def test_initial_weights_are_those_of_one_process(layout: Parallelism) -> None:
    expected = Decoder(MODEL)
    initialize(expected, MODEL, 17)

    def work(topology: Topology) -> list[str]:
        held = dict(_stage(topology, layout, 17).named_parameters())
        for name, parameter in held.items():
            assert torch.equal(whole(parameter), expected.get_parameter(name)), name
        return list(held)

    found = run_ranks(3 if layout.pipeline == 3 else 4, work)
    assert {name for held in found for name in held} == {name for name, _ in expected.named_parameters()}
    assert all(len(held) < len(list(expected.parameters())) for held in found)


@pytest.mark.parametrize(
    "layout", [Parallelism(pipeline=2, expert=2), Parallelism(pipeline=2, pipeline_chunks=2)], ids=str
)
def test_every_rank_of_a_pipeline_scores_sequences_of_its_own(layout: Parallelism) -> None:
    model = replace(MODEL, n_layers=4)
    expected = Decoder(model).eval()
    initialize(expected, model, 17)

    def work(topology: Topology) -> list[list[int]]:
        one = Scorer(expected, Precision.fp32, Topology(), 8)
        scorer = Scorer(_stage(topology, layout, 17, model).eval(), Precision.fp32, topology, 8)
        ids_BS = torch.arange(5 + topology.rank).view(1, -1).repeat(1 + topology.rank, 1) * 3 % 33
        torch.testing.assert_close(scorer.logits(ids_BS), one.logits(ids_BS), rtol=1e-5, atol=1e-6)
        prompts = [[topology.rank + 1, 7], [5]]
        found = scorer.continue_greedily(prompts, 3, lambda answer: len(answer) > topology.rank)
        assert found == one.continue_greedily(prompts, 3, lambda answer: len(answer) > topology.rank)
        return found

    assert len(run_ranks(layout.pipeline * layout.expert, work)) == layout.pipeline * layout.expert


def test_one_process_reads_what_stages_save_and_knows_how_each_weight_was_trained(tmp_path: Path) -> None:
    def save(topology: Topology) -> None:
        decoder = _stage(topology, LAYOUT, 17)
        optimizer = build_optimizer(decoder, ADAMW)
        assert decoder.pipeline is not None
        group = decoder.pipeline.group
        saver = CheckpointSaver(tmp_path, topology, 1, replicas_of(decoder), group)
        for batch in (1, 2):  # the second by the plan of the first
            saver.start(decoder, optimizer, Progress(batch, 8, 80, 1.5))
            saved = saver.wait()
            assert saved is None or not saved.error

    run_ranks(4, save)
    folder = tmp_path / "batch-00000002"
    decoder, expected = Decoder(MODEL), Decoder(MODEL)
    initialize(decoder, MODEL, 3)
    initialize(expected, MODEL, 17)
    optimizer = build_optimizer(decoder, ADAMW)
    load_checkpoint(folder, decoder, optimizer, Topology())
    for name, parameter in expected.named_parameters():
        assert torch.equal(decoder.get_parameter(name), parameter), name
    now = hyperparameters_of(decoder, optimizer.param_groups)
    assert read_hyperparameters(folder / STATE_FOLDER) == now
