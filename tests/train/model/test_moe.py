"""The MoE layer against a dense reference in float64; its losses, balancing and jitter."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train.model.init import initialize
from train.model.moe import MoE, MoEAux, balance_loss
from train.model.router import bias_step, update_bias
from train.recipe.errors import UserError
from train.recipe.schema import Balance, BalanceScope, Model, Moe, Score
from train.step.microbatch import number_sequences

# Shapes: B batch, S sequence, T tokens, D model, F hidden, E experts, K experts per token.
B, S, D, F, E, K = 2, 9, 16, 24, 8, 3
SETTINGS = Moe(experts=E, top_k=K)
MODEL = Model(
    d_model=D, n_layers=1, n_heads=1, n_kv_heads=1, ffn_hidden_size=F, vocab_size=8, max_sequence_tokens=S
)


def make_layer(moe: Moe = SETTINGS, dtype: torch.dtype = torch.float64) -> MoE:
    layer = MoE(D, F, moe, "cpu")
    initialize(layer, replace(MODEL, moe=moe, init_std=0.5), seed=1)
    return layer.to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(2), dtype=dtype, requires_grad=True)


def dense_reference(layer: MoE, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs every expert on every token, with weight 0 if it was not selected."""
    x_TD = x_BSD.reshape(-1, D)
    logits_TE = x_TD @ layer.router.layer.weight.t()
    scores_TE = logits_TE.exp() / logits_TE.exp().sum(dim=1, keepdim=True)
    kept_TE = scores_TE * (scores_TE >= scores_TE.sort(dim=1, descending=True).values[:, K - 1 : K])
    weights_TE = kept_TE / kept_TE.sum(dim=1, keepdim=True)
    w1, v1, w2 = (getattr(layer.experts.mlp, name).view(E, F, D) for name in ("w1", "v1", "w2"))
    gate_ETF, up_ETF = (torch.einsum("td,efd->etf", x_TD, w) for w in (w1, v1))
    out_ETD = torch.einsum("etf,efd->etd", gate_ETF * torch.sigmoid(gate_ETF) * up_ETF, w2)
    out_BSD = torch.einsum("te,etd->td", weights_TE, out_ETD).view_as(x_BSD)
    chosen_E = (kept_TE > 0).sum(dim=0)
    balance = E / (B * S * K) * (chosen_E * scores_TE.mean(dim=0)).sum()
    return out_BSD, balance, logits_TE.exp().sum(dim=1).log().square().mean()


def test_layer_and_its_gradients_equal_a_dense_reference() -> None:
    layer, x = make_layer(), inputs()
    out, aux = layer(x)
    expected, balance, z = dense_reference(layer, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close((balance_of(aux), aux.z_loss), (balance, z))
    assert aux.expert_tokens_E.sum() == B * S * K
    weights = {"x": x, "router": layer.router.layer.weight} | dict(layer.experts.mlp.named_parameters())
    coefficients = torch.randn_like(out)
    ours = torch.autograd.grad((out * coefficients).sum() + balance_and_z(aux), list(weights.values()))
    theirs = torch.autograd.grad((expected * coefficients).sum() + 3 * balance + z, list(weights.values()))
    for name, mine, other in zip(weights, ours, theirs, strict=True):
        if name in {"w1", "v1", "w2"}:
            for expert in range(E):
                torch.testing.assert_close(
                    mine.view(E, F, D)[expert], other.view(E, F, D)[expert], msg=f"{name}, expert {expert}"
                )
                assert other.view(E, F, D)[expert].any()
        else:
            torch.testing.assert_close(mine, other, msg=name)


def balance_of(aux: MoEAux) -> Tensor:
    return balance_loss(aux.mean_score_E[None], aux.expert_tokens_E[None])


def balance_and_z(aux: MoEAux) -> Tensor:
    return 3 * balance_of(aux) + aux.z_loss


@pytest.mark.parametrize("favourites", [(0,), (6, 7)])
def test_experts_without_tokens_and_experts_that_take_all(favourites: tuple[int, ...]) -> None:
    layer, x = make_layer(replace(SETTINGS, top_k=len(favourites))), inputs()
    with torch.no_grad():
        layer.router.layer.weight.zero_()
        layer.router.layer.weight[list(favourites)] = 9.0
        x.abs_()
    out, aux = layer(x)
    assert aux.expert_tokens_E.nonzero().flatten().tolist() == list(favourites)
    out.sum().backward()
    for weight in layer.experts.mlp.parameters():
        busy = weight.grad.view(E, -1).any(dim=1)
        assert busy.nonzero().flatten().tolist() == list(favourites)


@pytest.mark.parametrize("loss", [balance_of, lambda aux: aux.z_loss], ids=["balance", "z"])
def test_each_loss_moves_the_router_and_nothing_piles_up(loss: Callable[[MoEAux], Tensor]) -> None:
    from megablocks.layers import moe as megablocks_moe
    from megablocks.layers import router as megablocks_router

    layer = make_layer(dtype=torch.float32)
    gradients, values = [], []
    for _ in range(3):
        _, aux = layer(inputs(torch.float32))
        values.append(loss(aux))
        gradients.append(torch.autograd.grad(values[-1], layer.router.layer.weight)[0])
    assert gradients[0].abs().max() > 1e-4
    for value, gradient in zip(values, gradients, strict=True):
        assert torch.equal(value, values[0])
        assert torch.equal(gradient, gradients[0])
    assert not megablocks_moe.get_load_balancing_loss()
    assert not megablocks_router._ROUTER_LOGITS


def test_balance_loss_is_one_when_even_and_e_over_k_when_on_k_experts() -> None:
    layer, x = make_layer(), inputs()
    with torch.no_grad():
        layer.router.layer.weight.zero_()
        assert balance_of(layer(x)[1]) == pytest.approx(1.0)
        layer.router.layer.weight[:K] = 50.0
        x.abs_()
        assert balance_of(layer(x)[1]) == pytest.approx(E / K)


def test_balance_loss_sees_the_counts_that_it_is_given() -> None:
    scores_LE = torch.rand(2, E, dtype=torch.float64).softmax(dim=1)
    counts_LE = torch.stack([torch.arange(E), torch.arange(E) * 5 + 1])
    layers = zip(counts_LE, scores_LE, strict=True)
    expected = [E * (counts_E / counts_E.sum() * scores_E).sum() for counts_E, scores_E in layers]
    torch.testing.assert_close(balance_loss(scores_LE, counts_LE), torch.stack(expected).mean())


def test_bias_evens_a_skewed_router_and_enters_no_weight() -> None:
    layer = make_layer(replace(SETTINGS, balance=Balance.bias))
    x = torch.randn(1, 512, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    with torch.no_grad():
        layer.router.layer.weight[0] += 0.3

    def loads() -> Tensor:
        return layer(x)[1].expert_tokens_E

    assert loads().max() > 1.5 * 512 * K / E
    for step in range(60):
        update_bias(layer, loads()[None], rate=0.05 * 0.95**step)
    assert loads().max() < 1.1 * 512 * K / E
    assert loads().min() > 0.9 * 512 * K / E
    routing = layer.router(x.view(-1, D))
    unbiased_TK = routing.scores_TE.gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, unbiased_TK / unbiased_TK.sum(dim=1, keepdim=True))
    assert "router.expert_bias" in layer.state_dict()


def test_bias_steps_by_its_rate_towards_the_mean() -> None:
    moe = replace(SETTINGS, balance=Balance.bias)
    layer = make_layer(moe)
    update_bias(layer, torch.tensor([[9, 1, 5, 5, 5, 5, 5, 5]]), 0.25)
    assert layer.router.expert_bias is not None
    assert layer.router.expert_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("experts", [16, 256])
def test_a_step_of_the_bias_is_the_same_part_of_a_score_for_any_number_of_experts(experts: int) -> None:
    steps = {score: bias_step(Moe(experts=experts, score=score, balance=Balance.bias)) for score in Score}
    assert steps[Score.sigmoid] == 0.001, "DeepSeek-V3's"
    assert steps[Score.softmax] * experts == pytest.approx(0.001 / 0.5)
    # The step of the releases before, with which the ladder was trained.
    assert bias_step(Moe(experts=16, bias_update_rate=0.008)) == 0.001


def test_both_balances_by_loss_and_bias() -> None:
    layer = make_layer(replace(SETTINGS, balance=Balance.both))
    update_bias(layer, torch.arange(E)[None], 0.25)
    assert layer.router.expert_bias is not None and layer.router.expert_bias.abs().min() > 0
    loss = balance_of(layer(inputs())[1])
    assert torch.autograd.grad(loss, layer.router.layer.weight)[0].any()


def test_balancing_by_loss_keeps_no_bias() -> None:
    assert "router.expert_bias" not in make_layer().state_dict()


def test_jitter_changes_the_choice_only_in_training() -> None:
    layer, x = make_layer(replace(SETTINGS, jitter_eps=0.3)), inputs().view(-1, D)
    plain = make_layer().router(x)
    assert torch.equal(layer.eval().router(x).logits_TE, plain.logits_TE)
    noisy = layer.train().router(x)
    assert not torch.equal(noisy.logits_TE, plain.logits_TE)
    one_TD = torch.ones_like(x)
    with torch.no_grad():
        layer.router.layer.weight.copy_(torch.eye(E, D))
    noise_TE = layer.router(one_TD).logits_TE
    assert 0.7 <= noise_TE.min() < 0.8
    assert 1.2 < noise_TE.max() <= 1.3


@pytest.mark.parametrize("order", [None, 1.0, 2.0])
def test_weights_are_divided_by_their_norm(order: float | None) -> None:
    layer, x = make_layer(replace(SETTINGS, normalize_weights_p=order)), inputs()
    routing = layer.router(x.view(-1, D))
    chosen_TK = routing.scores_TE.sort(dim=1, descending=True).values[:, :K]
    expected_TK = chosen_TK if order is None else chosen_TK / chosen_TK.norm(p=order, dim=1, keepdim=True)
    torch.testing.assert_close(routing.weights_TK, expected_TK)


def of_each_sequence(layer: MoE, x_TD: Tensor, sequences: list[list[int]]) -> Tensor:
    """DeepSeek-V3's eq. 17-20 in loops, for sequences that are given by their tokens, weighted by length."""
    affinity_TE = torch.sigmoid(x_TD @ layer.router.layer.weight.t())
    total = torch.zeros((), dtype=x_TD.dtype)
    for tokens in sequences:
        length = len(tokens)
        for expert in range(E):
            chosen = sum(int(expert in affinity_TE[t].topk(K).indices.tolist()) for t in tokens)
            f = E / (K * length) * chosen
            p = sum(affinity_TE[t, expert] / affinity_TE[t].sum() for t in tokens) / length
            total = total + length / len(x_TD) * f * p
    return total


def test_balance_of_each_sequence_is_deepseeks_however_it_is_packed() -> None:
    moe = replace(
        SETTINGS, score=Score.sigmoid, balance=Balance.both, balance_scope=BalanceScope.sequence, groups=2
    )
    layer, x = make_layer(moe), inputs()
    update_bias(layer, torch.arange(E)[None], 0.2)  # which the loss does not see
    documents_BS = torch.tensor([[7] * 4 + [8] * 5, [8] * 1 + [9] * 8])
    parts = [list(range(4)), list(range(4, 9)), [9], list(range(10, 18))]
    router = layer.router.layer.weight

    def loss(rows: slice, documents_BS: Tensor | None) -> Tensor:
        part = x[rows]
        ids = None if documents_BS is None else documents_BS[rows]
        sequence_BS = number_sequences(part.shape[:2], ids, part.device)
        layer.sequence_T, layer.first_B = sequence_BS.flatten(), sequence_BS[:, 0]
        found = layer(part)[1].sequence_balance
        assert found is not None
        return found

    for documents, sequences in ((None, [list(range(9)), list(range(9, 18))]), (documents_BS, parts)):
        whole, expected = loss(slice(None), documents), of_each_sequence(layer, x.view(-1, D), sequences)
        torch.testing.assert_close(whole, expected)
        torch.testing.assert_close(
            torch.autograd.grad(whole, router)[0], torch.autograd.grad(expected, router)[0]
        )
        split = (loss(slice(1), documents) + loss(slice(1, 2), documents)) / 2
        torch.testing.assert_close(split, whole)
    layer.sequence_T = None
    rows = layer(x)[1].sequence_balance
    torch.testing.assert_close(rows, loss(slice(None), None))
    assert layer.eval()(x)[1].sequence_balance is None


@pytest.mark.parametrize("moe", [SETTINGS, replace(SETTINGS, groups=4, top_groups=2, top_k=3)])
def test_forced_balance_deals_every_expert_equally_many_tokens(moe: Moe) -> None:
    layer, tokens = make_layer(replace(moe, forced_balance=True)), 3 * E
    x_BSD = torch.randn(1, tokens, D, dtype=torch.float64)
    routing, (_, aux) = layer.router(x_BSD[0]), layer(x_BSD)
    assert aux.expert_tokens_E.tolist() == [tokens * K // E] * E
    assert all(len(set(row)) == K for row in routing.experts_TK.tolist())
    in_groups = (routing.experts_TK // (E // moe.groups)).tolist()
    assert all(len(set(row)) <= moe.top_groups for row in in_groups)
    kept_TK = routing.scores_TE.gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, kept_TK / kept_TK.sum(dim=1, keepdim=True))


def test_router_stays_fp32_under_autocast_and_experts_do_not() -> None:
    layer, x = make_layer(dtype=torch.float32), inputs(torch.float32)
    routing = layer.router(x.view(-1, D))
    expected, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast_routing = layer.router(x.view(-1, D))
        out, aux = layer(x)
    assert torch.equal(cast_routing.logits_TE, routing.logits_TE)
    assert cast_routing.weights_TK.dtype == aux.mean_score_E.dtype == aux.z_loss.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_meta_allocates_nothing_and_names_are_hugging_faces() -> None:
    layer = MoE(6144, 10752, Moe(experts=16), "meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    rows = 16 * 10752
    assert shapes == {
        "router.layer.weight": (16, 6144),
        "experts.mlp.w1": (rows, 6144),
        "experts.mlp.v1": (rows, 6144),
        "experts.mlp.w2": (rows, 6144),
    }
    assert all(parameter.is_meta for parameter in layer.parameters())
    shared = MoE(64, 96, Moe(16, expert_hidden_size=32, shared_hidden_size=48, shared_gate=True), "meta")
    names = {name: tuple(parameter.shape) for name, parameter in shared.named_parameters()}
    assert names["experts.mlp.w1"] == (16 * 32, 64)
    assert {name: shape for name, shape in names.items() if "shared" in name} == {
        "shared.w1.weight": (48, 64),
        "shared.v1.weight": (48, 64),
        "shared.w2.weight": (64, 48),
        "shared_gate.weight": (1, 64),
    }


def test_too_small_a_layer_is_the_recipes_mistake() -> None:
    with pytest.raises(UserError, match=r"model.ffn_hidden_size.*at least 16"):
        MoE(D, 15, SETTINGS, "cpu")
    with pytest.raises(UserError, match=r"model.moe.expert_hidden_size.*at least 16"):
        MoE(D, 24, replace(SETTINGS, expert_hidden_size=15), "cpu")


def test_silu_is_the_experts_activation() -> None:
    assert make_layer().experts.mlp.args.activation_fn is functional.silu
