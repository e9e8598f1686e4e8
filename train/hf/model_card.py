"""The contents of a Hugging Face folder besides the weights: configs, tokenizer, model card."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from data.tokenizer import TokenizerHandle, name_of, open_tokenizer
from train.hf.architectures import family_of
from train.hf.folders import CONFIG_FILE, HEADERS_FILE, INDEX_FILE, SOURCE_FOLDER, read_json
from train.hf.rope import views
from train.hf.weights import WeightSource
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.schema import Model, Recipe
from train.record.provenance import git_commit
from train.record.run_folder import TOKENIZER, read_digests
from train.record.summary import Summary, read_summary

CARD_FILE = "README.md"
GENERATION_FILE = "generation_config.json"
TEXT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md")
ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_texts(out: Path, source: WeightSource, config: dict[str, object], dtype: str) -> None:
    """Writes config, generation config, tokenizer and model card.

    Those of an imported folder are copied unchanged as long as they still apply. A config in which
    transformers 4 and 5 read different bases of RoPE is written again.

    Args:
        out: the Hugging Face folder.
        source: the exported weights; a run has its own tokenizer, an imported folder kept its source's.
        config: the model's part of the architecture's `config.json`.
        dtype: data type of the weights, by PyTorch's name.
    """
    kept = source.path / SOURCE_FOLDER
    kept = kept if kept.is_dir() else source.path
    ids: dict[str, object] = dict.fromkeys(ID_KEYS)  # Without them a config has those of its class.
    if source.recipe is not None:
        handle = tokenizer_of(source.recipe, source.path)
        handle.to_hugging_face(out, source.model.max_sequence_tokens)
        ids = _special_ids(handle)
        _write_json(out / GENERATION_FILE, ids | {"transformers_version": version("transformers")})
    elif (kept / CONFIG_FILE).is_file():
        for file in texts_of(kept):
            if file.name != CONFIG_FILE:
                shutil.copyfile(file, out / file.name)
        before = read_json(kept / CONFIG_FILE)
        ids = {key: before[key] for key in ID_KEYS if key in before}
        if _is_true(before, source.model, dtype):
            shutil.copyfile(kept / CONFIG_FILE, out / CONFIG_FILE)
    if not (out / CONFIG_FILE).exists():
        versions = {"torch_dtype": dtype, "transformers_version": version("transformers")}
        _write_json(out / CONFIG_FILE, config | ids | versions)
    if not (out / CARD_FILE).exists():
        architecture = read_json(out / CONFIG_FILE)["architectures"][0]
        (out / CARD_FILE).write_text(model_card(source, architecture, dtype))


def tokenizer_of(recipe: Recipe, checkpoint: Path) -> TokenizerHandle:
    """Opens the tokenizer with which a run trained its weights.

    Args:
        recipe: the run's recipe.
        checkpoint: a checkpoint in the run's folder, which records the tokenizer's fingerprint.

    Raises:
        UserError: if the shards have none, or have another one by now.
    """
    handle = open_tokenizer(recipe.tokenizer, Path(recipe.data.shards))
    trained = read_digests(checkpoint.parent.parent).get(TOKENIZER)
    if trained not in (None, handle.fingerprint):
        what = (
            f"{recipe.data.shards} has tokenizer {handle.fingerprint[:12]}, but {checkpoint} was trained with"
        )
        remedy = "give the shards that it was trained on"
        raise UserError(f"{what} {trained[:12]}", key="data.shards", remedy=remedy)
    return handle


def texts_of(folder: Path) -> list[Path]:
    """Returns a Hugging Face folder's files other than weights, their index and code."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and (file.suffix in TEXT_SUFFIXES or file.name.startswith(("LICENSE", "NOTICE")))
        and file.name not in {INDEX_FILE, HEADERS_FILE}
    )


def model_card(source: WeightSource, architecture: str, dtype: str) -> str:
    """Returns the model card: model, training data, use and limitations."""
    model = source.model
    name = source.recipe.name if source.recipe else source.path.resolve().name
    tags = ["text-generation", *(["moe"] if model.moe else [])]
    front = "\n".join(
        ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: {tags}", "---"]
    )
    lines = [front, f"# {name}", "", _describe(model, architecture, dtype), ""]
    if source.recipe is not None:
        lines += [*_training(source.recipe, source.path), ""]
    lines += [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")  # before 4.56: torch_dtype',
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        "```",
        "",
        "No remote code is needed.",
        "",
        "## Limits",
        "",
        "A base model: it continues text, does not follow instructions, has not been aligned, and may repeat",
        "errors and biases of its training data. Only the figures above were measured.",
        "",
    ]
    return "\n".join(lines)


def _describe(model: Model, architecture: str, dtype: str) -> str:
    total, active = sizes.total_parameters(model), sizes.active_parameters(model)
    kind = f"{model.moe.experts} experts, {model.moe.top_k} per token" if model.moe else "dense"
    return (
        f"{architecture}: {total:,} parameters, {active:,} active per token (without the input embedding); "
        f"{kind}; width {model.d_model}, {model.n_layers} layers, {model.n_heads} heads with "
        f"{model.n_kv_heads} key-value heads, vocabulary {model.vocab_size:,}, sequences of "
        f"{model.max_sequence_tokens:,} tokens. Weights are {dtype}."
    )


def _training(recipe: Recipe, checkpoint: Path) -> list[str]:
    progress = read_json(checkpoint / "progress.json")
    shares = ", ".join(f"{name} {share:.1%}" for name, share in recipe.data.domains.items())
    lines = [
        "## Training",
        "",
        f"Run `{recipe.name}`, {checkpoint.name}: {progress['tokens']:,} tokens ({shares}) with "
        f"{recipe.optimizer.kind.value}, peak learning rate {recipe.optimizer.learning_rate:g}, "
        f"{recipe.training.global_batch_sequences * recipe.data.sequence_tokens:,} tokens per step. "
        f"Exported at commit {git_commit()}.",
    ]
    if fingerprint := read_digests(checkpoint.parent.parent).get(TOKENIZER):
        lines.append(f"Tokenizer {name_of(recipe.tokenizer)}, fingerprint `{fingerprint}`.")
    summary = read_summary(checkpoint.parent.parent)
    if summary is not None and summary.batches == progress["batch"]:
        lines += ["", *_figures(summary)]
    return lines


def _figures(summary: Summary) -> list[str]:
    rows = [
        f"| {domain} | {loss:.4f} | {summary.unigram_entropy.get(domain, float('nan')):.4f} |"
        for domain, loss in summary.validation_loss.items()
    ]
    digests = [
        f"- {d.name} ({d.context}): {d.tokens:,} tokens, SHA-256 `{d.digest}`" for d in summary.datasets
    ]
    head = ["| domain | validation loss, nats per token | unigram entropy |", "|---|---|---|"]
    return [
        *head,
        *rows,
        "",
        f"Trained at commit {summary.git_commit} on {summary.hardware}. Data:",
        "",
        *digests,
    ]


def _is_true(config: dict[str, object], model: Model, dtype: str) -> bool:
    """Returns True if an imported config still describes the exported model, to transformers 4 and to 5."""
    # transformers 4 writes `torch_dtype`, 5 `dtype`.
    if any((config.get(key) or dtype) != dtype for key in ("torch_dtype", "dtype")):
        return False
    read = family_of(config).to_model
    # Whether there is a further layer is said by the files, not the config: transformers keeps its number.
    like = replace(model, mtp=False)
    return all(replace(read(view), mtp=False) == like for view in (config, *views(config)))


def _special_ids(handle: TokenizerHandle) -> dict[str, object]:
    return {"bos_token_id": handle.bos_id, "eos_token_id": handle.eos_id, "pad_token_id": handle.pad_id}


def _write_json(path: Path, tree: dict[str, object]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
