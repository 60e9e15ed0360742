"""Words -> tensors: the only place where that happens, for training and for search alike.

In: strings, a `tokenizers.Tokenizer`. Out: int64 token ids. Knows nothing of models or data sets. PyTorch is imported
only to return its tensors. Shapes: b texts, t tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from clipmatch.errors import ClipmatchError


class Tokenizer:
    """Text -> token ids, as `transformers.AutoTokenizer` gives them for the same `tokenizer.json`, without its weight.

    Always pads and cuts on the right. Holds no state between calls, so threads may share one.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._json = backend.to_str()
        self._prepare(tokenizers.Tokenizer.from_str(self._json))
        self.backend = backend

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises `ClipmatchError` if that is impossible."""
        self = cls.__new__(cls)
        try:
            self._json = Path(path).read_text(encoding="utf-8")
            self._prepare(tokenizers.Tokenizer.from_str(self._json))
        except Exception as error:  # the library raises bare Exception
            raise ClipmatchError(f"Cannot read the tokenizer {path}: {error}.") from error
        return self

    def _prepare(self, plain: tokenizers.Tokenizer) -> None:
        """Take a tokenizer for one's own, with neither padding nor truncation: both depend on the call."""
        self.pad_id = find_pad_id(plain)
        plain.no_padding()
        plain.no_truncation()
        self.plain = plain
        self.special = plain.num_special_tokens_to_add(False)

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """As it came, for `save`; read when it is first needed, for that takes as long as all else of a query."""
        return tokenizers.Tokenizer.from_str(self._json)

    def save(self, path: str | Path) -> None:
        """Write the `tokenizer.json` as it was read."""
        Path(path).write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over the whole tokenizer: vocabularies of one size are still told apart."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def __call__(
        self,
        texts: str | Sequence[str],
        padding: str | bool = "max_length",
        truncation: bool = True,
        max_length: int = 64,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """One text or several -> {"input_ids": ids, "attention_mask": 1 for a token, 0 for padding}.

        With `return_tensors` "np" or "pt" int64 [b, t], otherwise lists (one text: flat lists). t is `max_length`, or
        with `padding=True` the longest text of the call. Truncation keeps the special tokens at both ends.
        """
        batch = [texts] if isinstance(texts, str) else list(texts)
        ids = [self.encode(text, max_length if truncation else None) for text in batch]
        mask = [[1] * len(row) for row in ids]
        target = self.target_length(ids, padding, max_length)
        result: dict[str, Any] = {
            "input_ids": [row + [self.pad_id] * (target - len(row)) for row in ids],
            "attention_mask": [row + [0] * (target - len(row)) for row in mask],
        }
        if return_tensors is not None:
            return {name: as_tensor(rectangle(rows, target), return_tensors) for name, rows in result.items()}
        return {name: rows[0] for name, rows in result.items()} if isinstance(texts, str) else result

    def encode(self, text: str, max_length: int | None) -> list[int]:
        """Text -> ids with the special tokens, at most `max_length` of them."""
        if not isinstance(text, str):
            raise ClipmatchError(f"A text to be tokenized must be a string (got {text!r}).")
        # half a surrogate pair (a stray byte of the command line) is no UTF-8: it becomes "?"
        encoding = self.plain.encode(text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False)
        if max_length is not None:
            if max_length <= self.special:
                raise ClipmatchError(f"max_length must exceed the {self.special} special tokens (got {max_length}).")
            encoding.truncate(max_length - self.special)
        ids: list[int] = self.plain.post_process(encoding).ids
        return ids

    @staticmethod
    def target_length(ids: list[list[int]], padding: str | bool, max_length: int) -> int:
        """The length that shorter texts are padded to; 0 for no padding."""
        if padding == "max_length":
            return max_length
        if padding is True or padding == "longest":
            return max(map(len, ids), default=0)
        if padding is False:
            return 0
        raise ClipmatchError(f"padding must be 'max_length', True or False (got {padding!r}).")


def find_pad_id(backend: tokenizers.Tokenizer) -> int:
    """The padding id by the tokenizer's own setting, else by the usual names.

    Without any it is 0, and which token that is does not matter: the attention mask hides it.
    """
    if backend.padding is not None:
        return int(backend.padding["pad_id"])
    ids = (backend.token_to_id(name) for name in ("[PAD]", "<pad>"))
    return next((id for id in ids if id is not None), 0)


def rectangle(rows: list[list[int]], target: int) -> npt.NDArray[np.int64]:
    """Rows of one length -> [b, t]. Raises `ClipmatchError` if they differ."""
    lengths = {len(row) for row in rows} or {target}
    if len(lengths) > 1:
        raise ClipmatchError("The texts have different lengths and make no tensor; set padding=True and truncation.")
    return np.array(rows, dtype=np.int64).reshape(len(rows), *lengths)


def as_tensor(values: npt.NDArray[Any], kind: str) -> Any:
    """Array -> array ("np") or PyTorch tensor ("pt") of the same shape."""
    if kind == "np":
        return values
    if kind != "pt":
        raise ClipmatchError(f"return_tensors must be None, 'np' or 'pt' (got {kind!r}).")
    try:
        import torch
    except ImportError as error:
        raise ClipmatchError("Tensors need PyTorch: pip install 'clipmatch[train]'.") from error
    return torch.from_numpy(values)
