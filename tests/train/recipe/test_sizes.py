"""Closed forms against the published table (design.md, section 9) and against each other."""

from dataclasses import replace
from pathlib import Path

import pytest

from train.recipe import sizes
from train.recipe.curriculum import plan_stages
from train.recipe.reading import load_recipe
from train.recipe.schema import Data, Ffn, Latent, Model, Moe, Norm, Position, QkNormOver, Recipe, Training


def decoder(
    d: int, layers: int, heads: tuple[int, int], ffn: int, vocab: int = 100352, *, moe: Moe | None = None
) -> Model:
    return Model(
        d_model=d,
        n_layers=layers,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        max_sequence_tokens=4096,
        moe=moe,
    )


MPT = replace(
    decoder(4096, 32, (32, 32), 16384, 50432), ffn=Ffn.mlp, position=Position.alibi, tie_embeddings=True
)
OLMOE = replace(
    decoder(2048, 16, (16, 16), 1024, 50304, moe=Moe(experts=64, top_k=8)), norm=Norm.rmsnorm, qk_norm=True
)
QWEN3 = replace(
    decoder(2048, 48, (32, 4), 768, 151936, moe=Moe(experts=128, top_k=8)),
    head_width=128,
    norm=Norm.rmsnorm,
    qk_norm=True,
    qk_norm_over=QkNormOver.each_head,
)
LLAMA = replace(decoder(5120, 40, (40, 40), 13824, 32000), norm=Norm.rmsnorm)


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [
        pytest.param(
            decoder(6144, 40, (48, 8), 10752, moe=Moe()), 131_596_523_520, 35_853_146_112, id="dbrx"
        ),
        pytest.param(decoder(3072, 28, (24, 8), 5376, moe=Moe()), 23_519_013_888, 6_563_539_968, id="moe-b"),
        pytest.param(decoder(2048, 20, (16, 8), 3584, moe=Moe()), 7_709_870_080, 2_219_526_144, id="moe-a"),
        pytest.param(MPT, 6_649_286_656, 6_649_286_656, id="mpt-7b"),
        pytest.param(OLMOE, 6_919_161_856, 1_178_994_688, id="olmoe-1b-7b"),
        pytest.param(QWEN3, 30_532_122_624, 3_041_867_776, id="qwen3-30b-a3b"),
        pytest.param(LLAMA, 13_015_864_320, 12_852_024_320, id="llama2-13b"),
    ],
)
def test_published_table_to_the_last_digit(model: Model, total: int, active: int) -> None:
    assert sizes.total_parameters(model) == total
    assert sizes.active_parameters(model) == active


AHEAD = replace(decoder(64, 3, (4, 2), 112, 512, moe=Moe(experts=8, top_k=2)), mtp=True)
MIXED = decoder(64, 7, (4, 2), 112, 512, moe=Moe(experts=8, top_k=2, dense_layers=2, every_n_layers=2))


def test_layers_are_dense_or_have_experts() -> None:
    assert [sizes.has_experts(MIXED, layer) for layer in range(7)] == [0, 0, 0, 1, 0, 1, 0]
    dense, experts = sizes.alike_layers(MIXED)
    assert (dense.layers, experts.layers) == ((0, 1, 2, 4, 6), (3, 5))
    assert [sizes.expert_layers(each.model) for each in (dense, experts)] == [0, 7]
    idle = 2 * (8 - 2) * 3 * 112 * 64
    whole = sizes.total_parameters(MIXED)
    assert sizes.active_parameters(MIXED, input_embedding=True) == whole - idle
    assert sizes.alike_layers(OLMOE) == (sizes.Alike(OLMOE, tuple(range(16))),)
    assert sizes.alike_layers(LLAMA) == (sizes.Alike(LLAMA, tuple(range(40))),)


@pytest.mark.parametrize(
    "model",
    [
        *(MPT, LLAMA, OLMOE, QWEN3, MIXED, AHEAD, replace(MIXED, mtp=True, qkv_bias=True)),
        decoder(64, 3, (4, 2), 112, 512, moe=Moe(experts=8, top_k=2)),
    ],
)
def test_listed_weights_add_up_to_the_total(model: Model) -> None:
    listed = list(sizes.weights(model))
    assert sum(weight.elements for weight in listed) == sizes.total_parameters(model)
    assert len({weight.name for weight in listed}) == len(listed)


def test_experts_of_their_own_width_and_a_shared_one() -> None:
    """By hand, for a layer: router, experts, shared expert and gate; all but E - K experts are active."""
    D, F, E, K, shared = 64, 24, 32, 6, 40
    moe = Moe(experts=E, top_k=K, expert_hidden_size=F, shared_hidden_size=shared, shared_gate=True)
    finer, plain = (decoder(D, 3, (4, 2), 112, 512, moe=each) for each in (moe, Moe(experts=1, top_k=1)))
    added = E * D + 3 * E * F * D + 3 * shared * D + D
    replaced = D + 3 * 112 * D
    assert sizes.total_parameters(finer) - sizes.total_parameters(plain) == 3 * (added - replaced)
    idle = 3 * 3 * (E - K) * F * D
    assert sizes.active_parameters(finer, input_embedding=True) == sizes.total_parameters(finer) - idle
    forward = sizes.flops_per_token_forward(finer, 16).weights
    of_layer = 2 * (E * D + 3 * (K * F + shared) * D + D)
    assert forward - sizes.flops_per_token_forward(plain, 16).weights == 3 * (of_layer - 2 * replaced)


def test_multi_token_prediction_counts_in_training_only() -> None:
    """By hand: one more layer, a product of 2 D by D, three norms, and the output projection once more."""
    D, F, E, K, S = 64, 112, 8, 2, 16
    plain = replace(AHEAD, mtp=False)
    # Two norms, queries with two keys and values of 16 each, their projection, router and experts.
    of_layer = 2 * D + (4 + 2 * 2) * 16 * D + 4 * 16 * D + E * D + 3 * E * F * D
    joining = 2 * D * D + 3 * D
    assert sizes.total_parameters(AHEAD) - sizes.total_parameters(plain) == of_layer + joining
    assert sizes.active_parameters(AHEAD) == sizes.active_parameters(plain)
    assert sizes.flops_per_token_forward(AHEAD, S) == sizes.flops_per_token_forward(plain, S)
    more, without = (sizes.flops_per_token_training(model, S) for model in (AHEAD, plain))
    active = of_layer + joining - 3 * (E - K) * F * D + 512 * D
    assert more.weights - without.weights == 6 * active
    assert 3 * more.attention == 4 * without.attention


def test_input_embedding_counts_only_when_asked_and_untied() -> None:
    assert sizes.active_parameters(LLAMA, input_embedding=True) == sizes.total_parameters(LLAMA)
    assert sizes.active_parameters(MPT, input_embedding=True) == sizes.active_parameters(MPT)


def test_flops_of_forward_and_training() -> None:
    model = decoder(6144, 40, (48, 8), 10752, moe=Moe())
    training = sizes.flops_per_token_training(model, 4096)
    assert training.weights == 6 * 35_853_146_112
    assert training.attention == 12 * 40 * 6144 * 4096
    assert training.total == 3 * sizes.flops_per_token_forward(model, 4096).total
    wide = replace(model, head_width=96)  # 48 heads of 96
    assert sizes.flops_per_token_training(wide, 4096).attention == 12 * 40 * 48 * 96 * 4096
    latent = Latent(kv_rank=512, q_rank=1536, nope_width=128, rope_width=64, v_width=96)
    narrow = replace(model, n_kv_heads=48, latent=latent)
    assert sizes.flops_per_token_training(narrow, 4096).attention == 6 * 40 * 48 * (192 + 96) * 4096
    attention = 6144 * 1536 + 1536 + 1536 * 48 * 192 + 6144 * (512 + 64) + 512 + 512 * 48 * (128 + 96)
    attention += 48 * 96 * 6144
    replaced = 6144 * (48 + 2 * 8) * 128 + 6144 * 6144
    assert sizes.total_parameters(narrow) - sizes.total_parameters(model) == 40 * (attention - replaced)
    causal = sizes.flops_per_token_training(model, 4096, causal=True)
    assert (causal.weights, 2 * causal.attention) == (training.weights, training.attention)


def recipe(tokens: int, sequences: int = 32, microbatch: int = 4) -> Recipe:
    return Recipe(
        model=decoder(64, 2, (4, 2), 112, 512),
        data=Data(sequence_tokens=128),
        training=Training(
            duration_tokens=tokens, global_batch_sequences=sequences, microbatch_sequences=microbatch
        ),
    )


def test_batches_are_rounded_up() -> None:
    assert sizes.tokens_per_batch(recipe(4096)) == 4096
    assert [sizes.batches(recipe(n)) for n in (4096, 4097, 8192)] == [1, 2, 2]
    assert sizes.trained_tokens(recipe(4097)) == 8192


def test_microbatches_of_each_rank() -> None:
    assert [sizes.microbatches_per_rank(recipe(4096), world) for world in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(AssertionError):
        sizes.microbatches_per_rank(recipe(4096), 3)


def test_training_flops_cover_whole_batches() -> None:
    run = recipe(4097)
    token = sizes.flops_per_token_training(run.model, 128)
    assert sizes.training_flops(run).total == 8192 * token.total


def test_flops_of_a_batch_are_those_of_its_phases_length() -> None:
    run = load_recipe(Path(__file__).resolve().parents[3] / "yamls/dbrx.yaml")
    curriculum = plan_stages(run)
    # mixtures/12t.yaml: 4,096 tokens a sequence, 32,768 in the last phase.
    for batch, length in ((0, 4096), (curriculum.batches - 1, 32768)):
        token = sizes.flops_per_token_training(run.model, length)
        assert sizes.batch_flops_per_token(run.model, curriculum, batch) == token.total
    summed = sum(
        sizes.batch_flops_per_token(run.model, curriculum, stage.first_batch)
        * (stage.end_sample - stage.first_sample)
        * curriculum.sample_tokens
        for stage in curriculum.stages
    )
    assert summed == sizes.training_flops(run).total
