"""Initial weights into any layout, each rank its rows; frozen weights; a restored optimizer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from launch.verify.forked_ranks import run_ranks
from tests.fake_world import whole
from train.checkpoint.files import Progress, writing_ranks
from train.checkpoint.saver import CheckpointSaver
from train.hf import initial_weights
from train.hf.__main__ import main
from train.hf.initial_weights import freeze, load_initial_weights, restore_optimizer
from train.hf.weights import Weights, open_weights
from train.layout.mesh import build_mesh, build_sharded, replicas_of
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.model.init import initialize
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Balance, Model, Moe, Optimizer, Parallelism, Precision, Recipe
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

MakeRun = Callable[[Recipe], tuple[Path, Decoder]]

MODEL = Model(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_size=40,
    vocab_size=301,  # Not divisible by any number of ranks.
    max_sequence_tokens=64,
    clip_qkv=8,
    moe=Moe(experts=4, top_k=2, balance=Balance.bias),
)


@pytest.fixture
def recipe() -> Recipe:
    base = load_recipe(Path(__file__).parents[3] / "yamls" / "smoke.yaml")
    return replace(base, name="parent", model=MODEL)


def _save(root: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    saver = CheckpointSaver(root, Topology(), keep_last=2)
    saver.start(model, optimizer, progress)
    saved = saver.wait()
    assert saved is not None and saved.folder is not None, saved
    return saved.folder


def _sharded(model: Model, layout: Parallelism, topology: Topology) -> Decoder:
    decoder = Decoder(model, device="meta")
    mesh = build_mesh(layout, topology.world_size, "cpu")
    build_sharded(decoder, mesh, Precision.fp32, seed=1)
    return decoder


class Counted:
    """Weights that count the elements read."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.tensors, self.count = weights, weights.tensors, 0

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        rows = self.weights.read(name, first, last)
        self.count += rows.numel()
        return rows


@pytest.mark.parametrize("layout", [Parallelism(), Parallelism(expert=2), Parallelism(2, 2)], ids=str)
@pytest.mark.parametrize("form", ["checkpoint", "hugging face"])
def test_each_rank_gets_its_rows_and_one_of_each_replica_reads_them(
    layout: Parallelism,
    form: str,
    recipe: Recipe,
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moe = MODEL.moe
    assert moe is not None
    if form == "hugging face":
        recipe = replace(recipe, model=replace(MODEL, moe=replace(moe, balance=Balance.loss)))
    path, decoder = make_run(recipe)
    if form == "hugging face":
        _export_weights(path, tmp_path / "hf")
        path = tmp_path / "hf"
    expected = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}

    source = open_weights(path)
    counted = Counted(source.weights)
    monkeypatch.setattr(initial_weights, "open_weights", lambda _: replace(source, weights=counted))

    def work(topology: Topology) -> tuple[int, int]:
        sharded = _sharded(recipe.model, layout, topology)
        load_initial_weights(sharded, path, topology, replicas_of(sharded))
        parts = [t.to_local() if isinstance(t, DTensor) else t for t in sharded.state_dict().values()]
        reads = topology.rank in writing_ranks(4, layout.replicate)
        assert counted.count == reads * sum(part.numel() for part in parts)
        local = 0
        for name, tensor in sharded.state_dict().items():
            found = whole(tensor)
            torch.testing.assert_close(found, expected[name], rtol=0, atol=0, msg=name)
            local += tensor.to_local().numel() if isinstance(tensor, DTensor) else 0
        return local, sum(p.numel() for p in sharded.parameters())

    for local, total in run_ranks(4, work):
        assert local <= total / (4 / layout.replicate) * 1.1


def _export_weights(run: Path, out: Path) -> None:
    """The Hugging Face folder, without a tokenizer, as this run has none."""
    from train.hf.export import write_folder
    from train.hf.weights import WeightSource

    source = open_weights(run)
    write_folder(WeightSource(source.path, source.model, source.weights), out)


def test_the_balancing_bias_comes_along(recipe: Recipe, make_run: MakeRun) -> None:
    path, decoder = make_run(recipe)
    bias = "transformer.blocks.1.ffn.router.expert_bias"
    decoder.get_buffer(bias).copy_(torch.tensor([0.5, -0.5, 0.25, 0.0]))
    wrapped = torch.nn.ModuleDict({"decoder": decoder})
    optimizer = torch.optim.AdamW(decoder.parameters())
    _save(path / "checkpoints", wrapped, optimizer, Progress(9, 72, 576, 1.0))
    loaded = Decoder(MODEL, device="cpu")
    source = load_initial_weights(loaded, path)
    assert source.path.name == "batch-00000009"
    assert loaded.get_buffer(bias).tolist() == [0.5, -0.5, 0.25, 0.0]


def test_multi_token_prediction_may_be_added(recipe: Recipe, make_run: MakeRun) -> None:
    path, decoder = make_run(recipe)
    loaded, own = replace(MODEL, mtp=True), {}
    target = Decoder(loaded, device="cpu")
    initialize(target, loaded, seed=5)
    for name, parameter in target.named_parameters():
        own[name] = parameter.detach().clone()
    load_initial_weights(target, path)
    given = dict(decoder.named_parameters())
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, own[name] if name.startswith("transformer.mtp.") else given[name])


def _train(decoder: Decoder, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, MODEL.vocab_size, (4, 17), generator=generator)
        optimizer.zero_grad()
        decoder(ids[:, :-1], targets_BS=ids[:, 1:]).loss_sum.div(64).backward()
        optimizer.step()


def test_frozen_parts_stay_and_the_rest_moves(recipe: Recipe) -> None:
    decoder = Decoder(MODEL, device="cpu")
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for buffer in decoder.buffers():
        buffer.zero_()
    patterns = ["*.router.*", "transformer.blocks.0.*", "transformer.wte.weight"]
    frozen = freeze(decoder, patterns)
    optimizer = build_optimizer(decoder, Optimizer(learning_rate=0.1))
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    _train(decoder, optimizer, 2, seed=0)
    fixed = {name for name, p in decoder.named_parameters() if torch.equal(p, before[name])}
    expected = {n for n in before if "router" in n or ".blocks.0." in n or "wte" in n}
    assert fixed == expected and frozen == sum(before[name].numel() for name in expected)


def _whole(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Gathered copies of the parameters."""
    return {name: whole(parameter).detach().clone() for name, parameter in decoder.named_parameters()}


def test_frozen_parts_stay_when_sharded(recipe: Recipe) -> None:
    def work(topology: Topology) -> set[str]:
        decoder = _sharded(MODEL, Parallelism(expert=2), topology)
        freeze(decoder, ["*.experts.*", "*.router.*"])
        optimizer = build_optimizer(decoder, Optimizer(learning_rate=0.1))
        before = _whole(decoder)
        _train(decoder, optimizer, 2, seed=topology.rank)
        return {name for name, tensor in _whole(decoder).items() if torch.equal(tensor, before[name])}

    for fixed in run_ranks(2, work):
        assert len(fixed) == 8 and all(".experts." in name or ".router." in name for name in fixed)


def test_a_restored_optimizer_goes_on_with_this_recipes_rates(recipe: Recipe, tmp_path: Path) -> None:
    def built(rate: float, frozen: tuple[str, ...] = ()) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        decoder = Decoder(MODEL, device="cpu")
        torch.manual_seed(0)
        for tensor in [*decoder.parameters(), *decoder.buffers()]:
            torch.nn.init.normal_(tensor, std=0.1)
        freeze(decoder, list(frozen))
        optimizer = build_optimizer(decoder, Optimizer(learning_rate=rate, weight_decay=rate))
        return torch.nn.ModuleDict({"decoder": decoder}), optimizer

    old, old_optimizer = built(0.1)
    _train(old["decoder"], old_optimizer, 3, seed=0)  # type: ignore[index]
    folder = _save(tmp_path, old, old_optimizer, Progress(3, 12, 192, 1.0))
    new, new_optimizer = built(0.025)
    restore_optimizer(folder, new, new_optimizer, Topology())
    for (name, before), (_, now) in zip(old.named_parameters(), new.named_parameters(), strict=True):
        assert torch.equal(before, now), name
        torch.testing.assert_close(
            old_optimizer.state[before]["exp_avg"], new_optimizer.state[now]["exp_avg"]
        )
    assert {group["lr"] for group in new_optimizer.param_groups} == {0.025}
    assert {group["weight_decay"] for group in new_optimizer.param_groups} == {0.025, 0.0}
    part, part_optimizer = built(0.025, ("*.router.*",))
    restore_optimizer(folder, part, part_optimizer, Topology())
    saved = _save(tmp_path, part, part_optimizer, Progress(4, 12, 192, 1.0))
    with pytest.raises(UserError, match=r"no optimizer state of .*router.layer.weight"):
        restore_optimizer(saved, new, new_optimizer, Topology())


def test_export_says_what_a_bias_prevents(
    recipe: Recipe, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(recipe)
    assert main(["export", str(run), str(run / "out")]) == 2
    assert "balance=loss" in capsys.readouterr().err
