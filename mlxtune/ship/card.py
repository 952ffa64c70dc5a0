"""What a Hugging Face folder needs beside its weights, and its way to the hub."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from mlxtune_convert.files import read_json, write_json
from mlxtune_convert.gguf.tokenizer_write import token_ids

from mlxtune.data.template.template import Template
from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.errors import UserError
from mlxtune.train.run_folder import RunFolder

REPO = re.compile(r"[\w.-]+/[\w.-]+")
LICENCE = re.compile(r"[\w.-]+")  # an identifier such as apache-2.0


def write_generation_config(work: Path, config: dict[str, Any]) -> None:
    """generation_config.json with every id that ends an answer: the configs', the tokenizer's, the template's."""
    file = work / "generation_config.json"
    generation = read_json(file, "generation settings") if file.is_file() else {}
    tokenizer = load_tokenizer(work)
    ends = {*token_ids(config.get("eos_token_id")), *token_ids(generation.get("eos_token_id")), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        token = Template(tokenizer).end_of_turn.strip()
        ends.add(tokenizer.convert_tokens_to_ids(token) if token else None)
    write_json(file, {**generation, "eos_token_id": sorted(ends - {None})})


def write(work: Path, kind: str, base: str, licence: str, adapter: Path | None, note: str = "") -> None:
    """README.md as the hub shows it. kind: "transformers" or "peft"; base: hub id or ""; note: for its users."""
    from huggingface_hub import ModelCardData

    base = base if REPO.fullmatch(base) else ""  # a name that a stranger's file gave may be any text
    facts: dict[str, Any] = {"library_name": kind, "tags": ["mlxtune", "lora"], "license": licence or "unknown"}
    if base:
        facts["base_model"] = base
    head = ["---", ModelCardData(**facts).to_yaml(original_order=list(facts))]
    what = "merged and exported" if kind == "transformers" else "as a PEFT adapter, exported"
    body = ["---", "", f"A fine-tuned version of {base or 'its base model'}, {what} with mlxtune."]
    body += ["The licence of the base model applies." if not licence else "", note]
    if adapter is not None and RunFolder(adapter).is_run():
        run = RunFolder(adapter).config()
        lengths = f"{run.train.steps} steps" if run.train.steps else f"{run.train.epochs or 1:g} epochs"
        rows = {
            # Where the files lay on somebody's machine is nobody's business.
            "data": ", ".join(
                Path(source.path).name if Path(source.path).is_absolute() else source.path
                for source in run.data.mixture()
            ),
            "adapter": f"{run.lora.variant}, rank {run.lora.rank}, alpha {run.lora.alpha:g}, {run.lora.targets}",
            "trained in full": ", ".join(run.lora.train_also),
            "training": f"{lengths}, learning rate {run.train.lr:g} ({run.train.schedule}), seed {run.train.seed}",
            "loss on": f"{run.data.train_on} assistant turns, rows of up to {run.data.max_tokens} tokens",
        }
        lines = [f"| {name} | {_cell(text)} |" for name, text in rows.items() if text]
        body += ["", "| recipe | |", "|---|---|", *lines]
    (work / "README.md").write_text("\n".join([*head, *body, ""]), encoding="utf-8")


def _cell(text: str) -> str:
    """A text inside of a table: no column, no line and no HTML of its own."""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).split())
    return html.escape(text, quote=False).replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")


def licence_of(folder: Path) -> str:
    """The licence that a model folder's own card names, or "": a card is a stranger's text, and may be broken."""
    file = folder / "README.md"
    if not file.is_file():
        return ""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = file.read_text(encoding="utf-8", errors="replace")
    if not REGEX_YAML_BLOCK.search(text):  # the library would print a warning
        return ""
    try:
        licence = ModelCard(text, ignore_metadata_errors=True).data.get("license")
    except Exception:  # the YAML, its nesting, keys that are no names: whatever the library trips over
        return ""
    return licence if isinstance(licence, str) and LICENCE.fullmatch(licence) else ""


def check_repo(repo: str, public: bool) -> None:
    """Raise UserError before any work when an upload could not begin, or would be seen by more people than asked."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

    if not REPO.fullmatch(repo):
        raise UserError(f"--push {repo}: a repository on the hub looks like USER/NAME")
    if constants.is_offline_mode():
        raise UserError("--push needs the hub, and HF_HUB_OFFLINE is set", "Unset it, or leave --push out.")
    if not get_token():
        raise UserError("--push needs a login", "Log in first: hf auth login (or set HF_TOKEN).")
    try:
        _require_asked_for(repo, bool(HfApi().repo_info(repo).private), public)
    except RepositoryNotFoundError:
        return  # it will be made
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise UserError(
            f"--push {repo}: the hub cannot be asked who sees it ({' '.join(str(error).split())[:200]})",
            "Try again later, or leave --push out.",
        ) from error


def _require_asked_for(repo: str, private: bool, public: bool) -> None:
    if not private and not public:
        raise UserError(
            f"--push {repo}: this repository is public, everyone would see the export",
            "Choose another one, make it private on the hub, or add --public.",
        )
    if private and public:
        raise UserError(f"--push {repo}: this repository is private", "Leave --public out, or make it public first.")


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload a folder to a repository of the hub, made if there is none; return its address and who sees it, as the hub
    says.

    Raises UserError when the hub refuses or cannot be reached, or would show it to more people than asked; the folder
    stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        # Of a repository that is there already the hub ignores `private`, and says nothing.
        address = api.create_repo(repo, private=not public, exist_ok=True, repo_type="model")
        private = bool(api.repo_info(repo).private)
        _require_asked_for(repo, private, public)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload from mlxtune")
    except (HfHubHTTPError, HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        why = {401: "it does not accept your token", 403: "your token may not write there"}.get(status, str(error))
        raise UserError(
            f"the export is in {folder}, but the hub did not take it as {repo}: {' '.join(why.split())[:200]}",
            "Log in with a token that may write: hf auth login; then run the command again with --force.",
        ) from error
    return f"{address}: {'private' if private else 'public'}"
