"""Import of folders written by transformers: same function, same bytes back, every defect found."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.hf import safetensors_io
from train.hf.__main__ import main
from train.hf.import_hf import import_folder
from train.hf.initial_weights import load_initial_weights
from train.hf.safetensors_io import SafetensorsFolder
from train.hf.weights import Weights, open_weights
from train.hf.weights_folder import verify_weights_folder, write_weights_folder
from train.model.decoder import Decoder
from train.recipe.errors import UserError

SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = SIZES | {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
THETA = 500000.0
ROPE: dict[str, Any] = {"rope_theta": THETA, "rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
"""RoPE's base where transformers 4 reads it, and where 5 does."""


DEEPSEEK_LIKE = ["dots1", "glm4_moe", "deepseek_v3", "deepseek_v2"]
CLASSES = dict(zip(DEEPSEEK_LIKE, ("Dots1", "Glm4Moe", "DeepseekV3", "DeepseekV2"), strict=True))


def _deepseek_like(kind: str, **changes: int) -> Any:
    """A config with experts in DeepSeek's words."""
    import transformers

    make = getattr(transformers, f"{CLASSES[kind]}Config", None)
    if make is None:
        pytest.skip(f"this transformers has no {CLASSES[kind]}")
    config = LLAMA | ROPE | {"moe_intermediate_size": 24, "n_routed_experts": 12, "num_experts_per_tok": 3}
    config |= {"n_shared_experts": 2, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1}
    config |= {"routed_scaling_factor": 1.5} | changes
    if kind == "dots1":
        return make(**config, norm_topk_prob=True, sliding_window=None, head_dim=16)
    if kind == "glm4_moe":
        share = {"partial_rotary_factor": 0.25}  # other than the class's default
        config |= share | {"rope_parameters": ROPE["rope_parameters"] | share}
        return make(**config, attention_bias=True, use_qk_norm=True, head_dim=16)
    config |= {"num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 10}
    config |= {"qk_rope_head_dim": 6, "v_head_dim": 8}
    return make(**config, **({"topk_method": "group_limited_greedy"} if kind == "deepseek_v2" else {}))


def _model(kind: str, dtype: torch.dtype) -> Any:
    import transformers

    torch.manual_seed(5)
    if kind == "dbrx":
        config = transformers.DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            vocab_size=96,
            attn_config={"clip_qkv": 0.1, "kv_n_heads": 2, "rope_theta": THETA},
            rope_parameters=ROPE["rope_parameters"],
            ffn_config={"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0},
        )
    elif kind == "olmoe":
        config = transformers.OlmoeConfig(
            **LLAMA, **ROPE, num_experts=12, num_experts_per_tok=3, clip_qkv=0.5
        )
    elif kind == "llama":
        config = transformers.LlamaConfig(**LLAMA, **ROPE)
    elif kind == "qwen3":
        config = transformers.Qwen3Config(**LLAMA, **ROPE, head_dim=16, tie_word_embeddings=True)
    elif kind == "qwen3_moe":
        experts = {"moe_intermediate_size": 24, "num_experts": 12, "num_experts_per_tok": 3}
        experts |= {"num_hidden_layers": 4, "mlp_only_layers": [0], "decoder_sparse_step": 2}
        config = transformers.Qwen3MoeConfig(**(LLAMA | experts), **ROPE, head_dim=16, norm_topk_prob=True)
    elif kind == "qwen2":
        config = transformers.Qwen2Config(**LLAMA, **ROPE, tie_word_embeddings=True)
    elif kind == "qwen2_moe":
        experts = {"moe_intermediate_size": 24, "num_experts": 12, "num_experts_per_tok": 3}
        experts |= {"shared_expert_intermediate_size": 40, "num_hidden_layers": 3, "mlp_only_layers": [0]}
        config = transformers.Qwen2MoeConfig(**(LLAMA | experts), **ROPE)
    elif kind in DEEPSEEK_LIKE:
        config = _deepseek_like(kind)
    else:
        config = transformers.MixtralConfig(**LLAMA, **ROPE, num_local_experts=12, sliding_window=None)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "router" in name or "gate.weight" in name else 0.05
            is_norm = parameter.ndim == 1 and not name.endswith(".bias")
            parameter.copy_(torch.randn(parameter.shape) * scale + is_norm)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
    return model.to(dtype).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a DBRX in several files as transformers writes it."""
    _model("dbrx", torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    return tmp_path / "hf"


KINDS = ["dbrx", "llama", "mixtral", "olmoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", *DEEPSEEK_LIKE]


@pytest.mark.parametrize("kind", KINDS)
def test_imported_weights_compute_the_same_and_go_back_as_they_came(kind: str, tmp_path: Path) -> None:
    theirs = _model(kind, torch.float32)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "modeling.py").write_text("raise SystemError")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "ours"), "--shard-gb", "3e-5"]) == 0
    source = open_weights(tmp_path / "ours")
    assert len(SafetensorsFolder(tmp_path / "ours").files) > 2
    for start in (tmp_path / "ours", tmp_path / "hf"):  # Imported, or read in place.
        decoder = Decoder(source.model, device="cpu")
        load_initial_weights(decoder, start)
        ids = torch.randint(0, 96, (2, 20))
        with torch.no_grad():
            logits = decoder(ids).logits_BSV
            assert logits is not None and logits.std() > 0.01
            torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir() if file.suffix != ".py"}
    after = {file.name: file.read_bytes() for file in (tmp_path / "back").iterdir()}
    after.pop("README.md")
    # transformers 5 writes no `rope_theta`, without which 4 would compute something else: a new config.
    config, written = json.loads(after.pop("config.json")), json.loads(before.pop("config.json"))
    assert config == written or "rope_theta" not in written
    assert open_weights(tmp_path / "back").model == source.model and source.model.rope_theta == THETA
    assert json.loads(after.pop("provenance.json"))["lineage"]["weights"] == str(tmp_path / "ours")
    assert {k: v for k, v in after.items() if "index" not in k} == {
        k: v for k, v in before.items() if "index" not in k
    }
    index = "model.safetensors.index.json"
    assert json.loads(after[index])["weight_map"] == json.loads(before[index])["weight_map"]


@pytest.mark.parametrize(("kind", "layers"), [("deepseek_v3", 0), ("glm4_moe", 2)])
def test_layers_that_predict_further_tokens_are_left_out_with_a_word(
    kind: str, layers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    _model(kind, torch.float32).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    _config(num_nextn_predict_layers=layers)(folder)
    further = {"eh_proj.weight": torch.zeros(32, 64), "self_attn.o_proj.weight": torch.zeros(32, 32)}
    with_more = weights | {f"model.layers.2.{name}": weight for name, weight in further.items()}
    save_file(with_more, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
    output = "".join(capfd.readouterr())
    assert "leaves out layers [2], of multi-token prediction" in output
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    back = SafetensorsFolder(tmp_path / "back")
    assert back.tensors.keys() == weights.keys()
    save_file(weights | {"model.layers.1.eh_proj.weight": torch.zeros(32, 64)}, folder / "model.safetensors")
    assert main(["import", str(folder), str(tmp_path / "again")]) == 2
    assert f"model.layers.1.eh_proj.weight is not a tensor of a {kind} model" in capfd.readouterr().err


def _with_mtp(kind: str, folder: Path) -> tuple[Any, Any]:
    """Writes a model with a layer of multi-token prediction; returns transformers' model, and of that layer.

    The layer's model is one of a single layer that is given what it reads as embeddings.
    """
    import transformers

    torch.manual_seed(7)
    theirs = _model(kind, torch.float32)
    config = _deepseek_like(kind, num_hidden_layers=1, first_k_dense_replace=0)
    one = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for tensor in (*one.parameters(), *(b for n, b in one.named_buffers() if "correction" in n)):
            tensor.copy_(torch.randn(tensor.shape) * 0.1 + (tensor.ndim == 1))
        one.lm_head.weight.copy_(theirs.lm_head.weight)
    theirs.save_pretrained(folder, max_shard_size="20KB")
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    joining = {"eh_proj.weight": torch.randn(32, 64) * 0.2, "embed_tokens.weight": embedding}
    joining |= {name: torch.rand(32) + 0.5 for name in ("enorm.weight", "hnorm.weight")}
    joining |= {"shared_head.norm.weight": one.model.norm.weight.detach().clone()}
    joining |= {"shared_head.head.weight": weights["lm_head.weight"].clone()}
    one.save_pretrained(folder / "one")
    layer = load_file(folder / "one/model.safetensors")
    shutil.rmtree(folder / "one")
    further = {f"model.layers.2.{name}": tensor.clone() for name, tensor in joining.items()}
    further |= {
        name.replace("layers.0", "layers.2"): tensor for name, tensor in layer.items() if "layers.0" in name
    }
    last = "model-further.safetensors"
    save_file(further, folder / last, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(further, last)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _config(num_nextn_predict_layers=1)(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), (one, joining)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_multi_token_prediction_computes_the_same_and_goes_back_as_it_came(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    theirs, (one, joining) = _with_mtp(kind, folder)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
    source = open_weights(tmp_path / "ours")
    assert source.model.mtp
    decoder = Decoder(source.model, device="cpu")
    load_initial_weights(decoder, tmp_path / "ours")
    ids_BS = torch.randint(0, 96, (2, 21))
    outputs = decoder.train()(ids_BS[:, :-1], targets_BS=ids_BS[:, 1:])
    with torch.no_grad():
        hidden_BSD = theirs.model(ids_BS[:, :-2]).last_hidden_state
        logits_BSV = decoder.eval()(ids_BS[:, :-2]).logits_BSV
        torch.testing.assert_close(logits_BSV, theirs.lm_head(hidden_BSD), atol=1e-5, rtol=1e-5)

        def normed(x_BSD: Tensor, name: str) -> Tensor:
            eps = source.model.norm_eps
            return x_BSD / (x_BSD.square().mean(-1, keepdim=True) + eps).sqrt() * joining[f"{name}.weight"]

        next_BSD = joining["embed_tokens.weight"][ids_BS[:, 1:-1]]
        joined_BSD = torch.cat([normed(next_BSD, "enorm"), normed(hidden_BSD, "hnorm")], -1)
        ahead_BSV = one(inputs_embeds=joined_BSD @ joining["eh_proj.weight"].t()).logits
        expected = torch.nn.functional.cross_entropy(
            ahead_BSV.flatten(0, 1), ids_BS[:, 2:].flatten(), reduction="sum"
        )
    torch.testing.assert_close(outputs.mtp_loss_sum, expected, atol=1e-4, rtol=1e-5)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    for file in folder.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "back/config.json").read_text())["num_nextn_predict_layers"] == 1
    assert open_weights(tmp_path / "back").model == source.model


def test_an_own_embedding_of_the_further_layer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    _with_mtp("deepseek_v3", folder)
    _edit(folder, lambda tensors: tensors["model.layers.2.shared_head.head.weight"][95, 31].add_(1))
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 2
    complaint = capsys.readouterr().err
    assert "model.layers.2.shared_head.head.weight is not the copy of lm_head.weight" in complaint
    _config(num_nextn_predict_layers=0)(folder)
    assert main(["import", str(folder), str(tmp_path / "without")]) == 0
    assert not open_weights(tmp_path / "without").model.mtp


@pytest.mark.parametrize("spelling", ["both", "rope_parameters", "attn_config"])
def test_a_config_is_copied_only_if_every_version_reads_the_same_from_it(
    spelling: str, folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    if spelling == "rope_parameters":
        del config["attn_config"]["rope_theta"]
    elif spelling == "attn_config":
        del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert (back == config) is (spelling == "both")
    assert back["rope_parameters"]["rope_theta"] == back["attn_config"]["rope_theta"] == THETA


def test_a_config_of_another_data_type_is_not_copied(folder: Path, tmp_path: Path) -> None:
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--dtype", "fp32"]) == 0
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert {back[key] for key in ("dtype", "torch_dtype") if key in back} == {"float32"}


class CutOff:
    """Weights whose reading is interrupted after some blocks."""

    def __init__(self, weights: Weights, blocks: int) -> None:
        self.weights, self.left, self.tensors = weights, blocks, weights.tensors

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.weights.read(name, first, last)


def _killed_in_a_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """Stand-in for save_file that fails in the middle of the last file."""
    save_file(tensors, path, metadata)
    if "lm_head.weight" in tensors:
        path.write_bytes(path.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_import_that_was_cut_off_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours"
    source = open_weights(folder)
    with pytest.raises(KeyboardInterrupt):
        write_weights_folder(out, source.model, CutOff(source.weights, 12), {"of": "it"}, 20_000)
    with pytest.raises(UserError, match="neither"):
        open_weights(out)
    whole = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert len(whole) > 1
    with pytest.raises(UserError, match="another source"):
        write_weights_folder(out, source.model, source.weights, {"of": "something else"}, 20_000)
    written = write_weights_folder(out, source.model, source.weights, {"of": "it"}, 20_000)
    assert written.resumed_files == len(whole) < written.files
    assert all(file.stat().st_mtime_ns == time for file, time in whole.items())
    imported = open_weights(out).weights
    for name in source.weights.tensors:
        assert torch.equal(imported.read(name), source.weights.read(name))
    assert verify_weights_folder(out) == written.bytes


def test_an_import_that_was_killed_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = open_weights(folder), tmp_path / "ours"
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(safetensors_io, "save_file", _killed_in_a_file)
        write_weights_folder(out, source.model, source.weights, {}, 20_000)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert list(out.glob("*.partial")), "was not killed in the middle of a file"
    written = write_weights_folder(out, source.model, source.weights, {}, 20_000)
    assert 0 < written.resumed_files < written.files
    whole = write_weights_folder(tmp_path / "at once", source.model, source.weights, {}, 20_000)
    assert verify_weights_folder(out) == whole.bytes
    for file in (tmp_path / "at once").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert not list(out.glob("*.partial"))


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites a folder as one file with changed tensors."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


W1 = "transformer.blocks.1.ffn.experts.mlp.w1"
TENSOR_FAULTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    f"{W1} is missing": lambda tensors: tensors.pop(W1),
    f"{W1} has shape": lambda tensors: tensors.update({W1: tensors[W1][:-1].contiguous()}),
    f"{W1} is F8_E4M3": lambda tensors: tensors.update({W1: tensors[W1].to(torch.float8_e4m3fn)}),
    "surplus is not a tensor": lambda tensors: tensors.update({"surplus": torch.zeros(2)}),
    f"{W1}: contains NaN": lambda tensors: tensors[W1][3].fill_(float("nan")),
    "wte.weight: contains NaN or infinity": lambda tensors: tensors["transformer.wte.weight"][95, 31].fill_(
        float("inf")
    ),
}


@pytest.mark.parametrize("words", TENSOR_FAULTS)
def test_every_fault_of_a_tensor_is_found(
    words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _edit(folder, TENSOR_FAULTS[words])
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("import: ") and words in complaint
    assert not (tmp_path / "ours" / "model.yaml").exists()


def _truncate(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-2])


def _pickles_only(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


FOLDER_FAULTS: dict[str, Callable[[Path], object]] = {
    "is not a complete safetensors file": _truncate,
    "pickles are not read": _pickles_only,
    "is not a file in the folder": _outside,
    "lists transformer": lambda folder: (
        shutil.copy(sorted(folder.glob("*.safetensors"))[0], sorted(folder.glob("*.safetensors"))[1]) and None
    ),
    "model_type 'gpt2' is not one of": _config(model_type="gpt2"),
    "resid_pdrop is 0.1; only 0": _config(resid_pdrop=0.1),
    "n_layers is None": _config(n_layers=None),
    "rope_parameters.rope_type is 'llama3'; only 'default'": _config(
        rope_parameters={"rope_type": "llama3", "factor": 8.0}
    ),
    "attn_config.rope_theta is 500000.0, rope_parameters.rope_theta is 10000.0; they": _config(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    ),
}


@pytest.mark.parametrize("words", FOLDER_FAULTS)
def test_every_fault_of_a_folder_is_found(
    words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FOLDER_FAULTS[words](folder)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("import: ") and (words in complaint or "is in two files" in complaint)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_what_cannot_be_expressed_is_named(
    change: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _model("llama", torch.float32).save_pretrained(tmp_path / "hf")
    _config(**change)(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 2
    assert words in capsys.readouterr().err


def test_a_changed_file_is_found_by_verify(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
    assert main(["import", str(tmp_path / "ours"), "--verify"]) == 0
    file = tmp_path / "ours" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["import", str(tmp_path / "ours"), "--verify"]) == 2
    assert "SHA-256 differs" in capsys.readouterr().err


def test_one_file_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Two tensors of 128 MiB are imported one at a time."""
    import transformers

    config = transformers.LlamaConfig(**(LLAMA | {"vocab_size": 1 << 20, "num_hidden_layers": 1}))
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    (tmp_path / "hf").mkdir()
    save_file(
        {name: torch.ones(tensor.shape) for name, tensor in state.items()}, tmp_path / "hf/model.safetensors"
    )
    config.save_pretrained(tmp_path / "hf")
    edited = json.loads((tmp_path / "hf/config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "hf/config.json").write_text(json.dumps(edited))
    before = _reset_peak()
    assert import_folder(tmp_path / "hf", tmp_path / "ours", 0.13).bytes > 2 * 128 * 2**20
    assert _peak() - before < 192 * 2**20, "one and a half of them"


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _peak() -> int:
    return _memory("VmHWM")


def _memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def test_a_model_of_another_shape_is_refused(folder: Path) -> None:
    decoder = Decoder(replace(open_weights(folder).model, vocab_size=97), device="cpu")
    with pytest.raises(UserError, match=r"wte.weight has shape \(96, 32\), the recipe's has \(97, 32\)"):
        load_initial_weights(decoder, folder)
