"""What a run changes in its model's tokenizer, applied to a tokenizer and read from one."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from mlxtune_convert import tokenizer_changes
from mlxtune_convert.tokenizer_changes import FILE, TOKENIZER

from mlxtune.config.resolve import Config
from mlxtune.data.template.choice import missing, set_template
from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.errors import UserError

__all__ = ["FILE", "Changes"]


class Changes(tokenizer_changes.Changes):
    """The same for tokenizers that are not a tokenizer.json: transformers makes one of them."""

    @classmethod
    def of_files(cls, folder: Path) -> Self:
        """What the tokenizer beside a PEFT adapter says; nothing where there is none."""
        with as_json(folder) as made:
            return super().of_files(made)

    def apply(self, tokenizer: Any, folder: Path) -> None:
        """Change a tokenizer so. folder: where it is from. Raises UserError when a token gets another id there, or the
        token that ends an answer has none.
        """
        add(tokenizer, sorted(self.tokens, key=lambda token: self.tokens[token]), folder)
        wrong = [token for token, index in self.tokens.items() if tokenizer.convert_tokens_to_ids(token) != index]
        if wrong:
            raise UserError(
                f"{folder}: its tokenizer has another number for {wrong[0]} than the adapter was trained with",
                "Use the model that the adapter was trained on.",
            )
        if self.eos_token and self.eos_token not in tokenizer.get_vocab():
            raise UserError(
                f"{folder}: its tokenizer does not have {self.eos_token!r}, which ends the adapter's answers",
                "Use the model that the adapter was trained on.",
            )
        tokenizer.chat_template = self.chat_template or tokenizer.chat_template
        tokenizer.eos_token = self.eos_token or tokenizer.eos_token

    def write(self, folder: Path) -> None:
        """Change the tokenizer files in a folder so."""
        if not self.empty and not (folder / TOKENIZER).is_file():  # made of tokenizer.model each time
            load_tokenizer(folder).backend_tokenizer.save(str(folder / TOKENIZER))
        super().write(folder)


@contextlib.contextmanager
def as_json(folder: Path) -> Iterator[Path]:
    """The folder of a tokenizer, or a temporary one with the tokenizer.json that transformers makes of its files."""
    if (folder / TOKENIZER).is_file() or not (folder / "tokenizer_config.json").is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        load_tokenizer(folder).save_pretrained(made)
        yield Path(made)


def add(tokenizer: Any, tokens: Sequence[str], folder: Path) -> None:
    """Add special tokens that the vocabulary does not have. Raises UserError where their numbers are taken."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    if set(known.values()) & set(tokenizer.convert_tokens_to_ids(new)):
        raise UserError(f"{folder}: its vocabulary has gaps, so no token can be added to it")


def preview_tokenizer(folder: Path, config: Config) -> Any:
    """The tokenizer to look at rows with, as a run would set it up; the folder may hold it alone.

    Tokens that the template needs are added where the run trains embeddings: whether it trains all that they need is
    known only with the model. Raises UserError as `set_template` does.
    """
    tokenizer = load_tokenizer(folder)
    start, template = config.lora.start_from, config.data.template
    Changes.read(Path(start) if start else None).apply(tokenizer, folder)
    if template and "embeddings" in config.lora.train_also:
        add(tokenizer, missing(tokenizer, template), folder)
    set_template(tokenizer, folder, template)
    return tokenizer


def tokenizer_of(folder: Path, adapter: Path | None) -> Any:
    """The tokenizer of a model folder as a run changed it."""
    tokenizer = load_tokenizer(folder)
    Changes.read(adapter).apply(tokenizer, folder)
    return tokenizer
