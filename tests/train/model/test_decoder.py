"""The whole decoder: names, documents, losses, dense variants."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from train.model.attention import AttentionPlan, DocumentKernel
from train.model.decoder import Decoder, DecoderOutput, targets_ahead
from train.model.init import initialize
from train.model.kv_cache import CachedDecoder
from train.model.moe import MoE, balance_loss
from train.model.router import update_bias
from train.recipe.schema import Balance, Ffn, Model, Moe, Norm, Position, Precision, Recipe
from train.step.microbatch import MicrobatchModel

# Shapes: B batch, S sequence, V vocabulary, L layers, E experts.
B, S, V = 2, 16, 61
CFG = Model(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_size=40,
    vocab_size=V,
    max_sequence_tokens=S,
    clip_qkv=1.0,
    init_std=0.2,
    moe=Moe(experts=4, top_k=2, jitter_eps=0.1),
)
DENSE = {
    "llama": replace(CFG, moe=None, norm=Norm.rmsnorm, clip_qkv=None),
    "mpt": replace(CFG, moe=None, ffn=Ffn.mlp, position=Position.alibi, tie_embeddings=True, n_kv_heads=4),
}


def make(cfg: Model = CFG, **options: bool | int) -> Decoder:
    model = Decoder(cfg, device="cpu", **options)
    initialize(model, cfg, seed=1)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, S), generator=generator)
    documents = torch.tensor([[0] * 6 + [1] * 10, [2] * 15 + [3]], dtype=torch.int32)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    targets[0, 5] = -100
    return ids, documents, targets


def total(out: DecoderOutput) -> Tensor:
    return out.loss_sum / out.target_tokens + 0.3 * out.balance_loss + 0.1 * out.z_loss


def test_names_are_hugging_faces() -> None:
    block = {
        "norm_attn_norm.norm_1.weight",
        "norm_attn_norm.attn.Wqkv.weight",
        "norm_attn_norm.attn.out_proj.weight",
        "norm_attn_norm.norm_2.weight",
        "ffn.router.layer.weight",
        "ffn.experts.mlp.w1",
        "ffn.experts.mlp.v1",
        "ffn.experts.mlp.w2",
    }
    expected = {f"transformer.blocks.{layer}.{name}" for layer in range(2) for name in block}
    expected |= {"transformer.wte.weight", "transformer.norm_f.weight", "lm_head.weight"}
    assert set(Decoder(CFG, device="meta").state_dict()) == expected


def test_losses_are_those_of_the_logits() -> None:
    model, (ids, documents, targets) = make().eval(), batch()
    out = model(ids, documents, targets)
    plain = model(ids, documents)
    assert out.logits_BSV is None
    expected = torch.nn.functional.cross_entropy(
        plain.logits_BSV.flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(out.token_losses_BS.flatten(), expected)
    torch.testing.assert_close(out.loss_sum, expected.sum())
    assert out.target_tokens == (targets != -100).sum() == 2 * S - 3
    assert plain.loss_sum == plain.target_tokens == 0
    assert plain.token_losses_BS is None
    assert out.expert_tokens_LE.dtype == torch.int64
    assert out.expert_tokens_LE.sum(dim=1).tolist() == [B * S * 2] * 2


@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_z_loss_is_minimised_but_neither_reported_nor_validated(tied: bool) -> None:
    model = replace(CFG, moe=None, tie_embeddings=tied, logit_z_loss_weight=0.5)
    decoder, (ids, documents, targets) = make(model), batch()
    squares = decoder(ids, documents).logits_BSV.logsumexp(dim=-1).square()[targets != -100]
    with torch.no_grad():
        validated = decoder.eval()(ids, documents, targets).loss_sum
    microbatch = MicrobatchModel(decoder.train(), Recipe(model=model), Precision.fp32)
    given = {"input_ids": ids, "document_ids": documents, "targets": targets}
    outputs = microbatch(given)
    found = microbatch.loss(outputs, given)
    torch.testing.assert_close(outputs.loss_sum, validated + 0.5 * squares.sum())
    positions = B * (S - 1)
    torch.testing.assert_close(found["language"], validated / positions)
    torch.testing.assert_close(found["logit_z"], squares.detach().sum() / positions)
    torch.testing.assert_close(found["total"], outputs.loss_sum / positions)


def test_balance_and_z_loss_are_means_over_layers() -> None:
    model, (ids, documents, targets) = make().eval(), batch()
    seen = []
    for block in model.transformer.blocks:
        block.ffn.register_forward_hook(lambda _module, _inputs, result: seen.append(result[1]))
    out = model(ids, documents, targets)
    assert len(seen) == 2
    layers = [balance_loss(aux.mean_score_E[None], aux.expert_tokens_E[None]) for aux in seen]
    torch.testing.assert_close(out.balance_loss, (layers[0] + layers[1]) / 2)
    torch.testing.assert_close(out.z_loss, (seen[0].z_loss + seen[1].z_loss) / 2)
    assert torch.equal(out.expert_tokens_LE, torch.stack([aux.expert_tokens_E for aux in seen]))


AHEAD = replace(CFG, mtp=True, moe=Moe(experts=4, top_k=2))


def test_multi_token_prediction_reads_the_next_token_and_none_after_it() -> None:
    """Each target's loss depends on the tokens up to the next, of its own document, and on no other."""
    model, (ids, documents, targets) = make(replace(AHEAD, moe=None)), batch()

    def losses(ids: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = model.transformer.mtp.register_forward_hook(lambda *given: seen.append(given[2][0]))
        model(ids, documents, targets)
        hook.remove()
        return seen[0]

    plain = losses(ids)
    for place in (3, 6, 9):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % V
        changed = (losses(other) - plain).abs().amax(dim=-1)[0] > 1e-6
        first, end = (0, 6) if place < 6 else (6, S)
        # The position before reads it as its next token; one of the document before has no target then.
        assert changed.nonzero().flatten().tolist() == [*range(place - 1, end)]
        assert place > first or targets_ahead(targets, documents)[0, place - 1] == -100


def test_tokens_after_the_next_are_targets_within_a_document() -> None:
    ids, documents, targets = batch()
    found = targets_ahead(targets, documents)
    wanted = torch.full_like(ids, -100)
    wanted[0, :4], wanted[0, 6:14], wanted[1, :13] = ids[0, 2:6], ids[0, 8:], ids[1, 2:15]
    assert torch.equal(found, wanted)
    unmasked = targets_ahead(targets, None)  # of documents that see each other, only missing targets count
    wanted[1, 13] = ids[1, 15]
    wanted[0, 4:6] = torch.tensor([-100, -100])
    assert torch.equal(unmasked, wanted)


def test_only_training_predicts_several_tokens() -> None:
    model, (ids, documents, targets) = make(AHEAD), batch()
    plain = make(replace(AHEAD, mtp=False))
    trained, validated = model(ids, documents, targets), model.eval()(ids, documents, targets)
    assert trained.mtp_loss_sum > 1 and validated.mtp_loss_sum == 0
    assert [len(out.expert_tokens_LE) for out in (trained, validated)] == [3, 2]
    torch.testing.assert_close(trained.loss_sum, plain(ids, documents, targets).loss_sum)
    assert torch.equal(CachedDecoder(model).feed(ids), CachedDecoder(plain).feed(ids))


MIXED = replace(
    CFG,
    n_layers=5,
    moe=Moe(experts=4, top_k=2, dense_layers=1, every_n_layers=2, balance=Balance.bias),
)


def test_dense_layers_and_layers_of_experts_in_turn() -> None:
    """Of five layers, the second and the fourth have experts; each has its counts, and a bias of its own."""
    model, (ids, documents, targets) = make(MIXED), batch()
    names = {name.removeprefix("transformer.") for name, _ in model.named_parameters() if ".ffn." in name}
    experts = ("router.layer.weight", "experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2")
    dense = ("w1.weight", "v1.weight", "w2.weight")
    assert names == {
        f"blocks.{layer}.ffn.{name}" for layer in range(5) for name in (experts if layer in (1, 3) else dense)
    }
    out = model(ids, documents, targets)
    assert out.expert_tokens_LE.sum(dim=1).tolist() == [B * S * 2] * 2
    counts_LE = torch.tensor([[4, 0, 2, 2], [0, 4, 2, 2]])
    update_bias(model, counts_LE, 0.5)
    biases = [model.transformer.blocks[layer].ffn.router.expert_bias.tolist() for layer in (1, 3)]
    assert biases == [[-0.5, 0.5, 0, 0], [0.5, -0.5, 0, 0]]
    cached = CachedDecoder(model)
    steps = [cached.feed(part) for part in ids.split([7, 1, 8], dim=1)]
    torch.testing.assert_close(steps[-1], model.eval()(ids).logits_BSV[:, -1])


def test_a_kernel_for_documents_may_be_chosen() -> None:
    model = make(replace(CFG, moe=Moe(experts=4, top_k=2)))
    expected = model(*batch()).loss_sum
    plans: list[AttentionPlan] = []
    model.transformer.blocks[0].register_forward_pre_hook(lambda _, inputs: plans.append(inputs[1]))
    model.transformer.document_kernel = DocumentKernel.varlen
    torch.testing.assert_close(model(*batch()).loss_sum, expected)
    assert plans[0].documents is not None and plans[0].bias is None


@pytest.mark.parametrize("cfg", [CFG, DENSE["mpt"]], ids=["rope", "alibi"])
def test_packed_documents_equal_separate_ones(cfg: Model) -> None:
    model, (ids, documents, targets) = make(cfg).eval(), batch()
    packed = model(ids, documents, targets).token_losses_BS
    unmasked = model(ids, None, targets).token_losses_BS
    for document in documents.unique():
        own = documents == document
        alone = model(ids[own][None], None, targets[own][None]).token_losses_BS
        torch.testing.assert_close(packed[own], alone[0], rtol=1e-4, atol=1e-5)
    assert (packed - unmasked)[0, 7:-1].abs().min() > 1e-4, "the documents would have seen each other"


def test_bf16_is_near_fp32() -> None:
    model = make()
    exact = model.eval()(*batch())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(*batch())
    torch.testing.assert_close(rounded.loss_sum, exact.loss_sum, rtol=2e-2, atol=0)
    assert rounded.balance_loss.dtype == rounded.loss_sum.dtype == torch.float32


@pytest.mark.parametrize("name", DENSE)
def test_dense_relatives_learn_and_have_no_experts(name: str) -> None:
    model = make(DENSE[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        out = model(*batch())
        losses.append(total(out).item())
        total(out).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert out.balance_loss == out.z_loss == 0
    assert out.expert_tokens_LE.numel() == 0
    assert not any(isinstance(module, MoE) for module in model.modules())


def test_tied_embeddings_have_both_gradients() -> None:
    cfg = DENSE["mpt"]
    tied, (ids, documents, targets) = make(cfg), batch()
    untied = make(replace(cfg, tie_embeddings=False))
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.transformer.wte.weight})
    for model in (tied, untied):
        model(ids, documents, targets).loss_sum.backward()
    both = untied.transformer.wte.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(tied.transformer.wte.weight.grad, both)


def test_meta_allocates_nothing() -> None:
    cfg = replace(CFG, d_model=6144, n_heads=48, n_kv_heads=8, ffn_hidden_size=10752, vocab_size=100352)
    model = Decoder(replace(cfg, n_layers=40, moe=Moe(balance=Balance.bias)), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 131_596_523_520
    assert all(tensor.is_meta for tensor in model.state_dict().values())
