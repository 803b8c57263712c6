"""Tokenizer: a byte-pair vocabulary trained on captions, or one loaded from a file or the hub.

B captions, L tokens in the longest of them, special tokens included.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

PAD, CLS, SEP = "[PAD]", "[CLS]", "[SEP]"
_LONGEST_TEXT = 10_000
_MOST_BYTES = 2**28
_SPECIAL_TOKENS = (PAD, CLS, SEP)
_SMALLEST_VOCABULARY = 256 + len(_SPECIAL_TOKENS)
_PAD_NAMES = (PAD, "<pad>", "<|pad|>", "<|endoftext|>")


class Tokenizer:
    """Maps captions to `{"input_ids", "attention_mask"}`, truncated and padded on the right.

    Args:
        backend: a tokenizer of the `tokenizers` library; its padding and truncation settings are
            replaced.
        context_length: maximum number of tokens, special tokens included.
        pad_token: the padding token; found among the usual names when None.

    Raises:
        ValueError: `context_length` leaves no room for a token, or `backend` has no padding token.

    Example:
        >>> tokenizer = train_tokenizer(["red heart", "red car"], context_length=8)
        >>> tokenizer(["red heart", "car"])["attention_mask"].tolist()
        [[1, 1, 1, 1], [1, 1, 1, 0]]
    """

    def __init__(
        self, backend: FastTokenizer, *, context_length: int, pad_token: str | None = None
    ) -> None:
        _check_context_length(context_length, backend.num_special_tokens_to_add(False))
        _quiet_in_forked_workers()
        self._backend = backend
        self.context_length = context_length
        self.pad_token = pad_token or _find_pad_token(backend)
        self.pad_token_id = _token_id(backend, self.pad_token)
        backend.enable_truncation(max_length=context_length)
        backend.enable_padding(pad_id=self.pad_token_id, pad_token=self.pad_token)

    @property
    def vocab_size(self) -> int:
        """Rows of an embedding table for this vocabulary: the largest token id plus one."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def __call__(
        self, captions: Sequence[str], *, pad_to_context: bool = False
    ) -> dict[str, Tensor]:
        """Encode captions.

        Args:
            captions: B strings, B at least 1.
            pad_to_context: pad to `context_length`, which gives a compiled model a single shape;
                otherwise to the longest caption.

        Returns:
            `input_ids` and `attention_mask`, both int64 (B, L); the mask is 0 on padding, else 1.

        Raises:
            ValueError: `captions` is one string, or empty.
        """
        if isinstance(captions, str) or len(captions) == 0:
            raise ValueError(
                "captions: expected a non-empty list of strings, "
                f"got {captions!r}; pass e.g. ['red heart']"
            )
        try:
            encodings = self._backend.encode_batch_fast(list(captions))
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise ValueError(
                f"tokenizer: expected it to encode texts, got a failure of its library ({error}); "
                "restore its file from a backup, or use another tokenizer"
            ) from error
        ids = torch.tensor([e.ids for e in encodings], dtype=torch.int64)  # (B, L)
        mask = torch.tensor([e.attention_mask for e in encodings], dtype=torch.int64)
        if pad_to_context:
            missing = (0, self.context_length - ids.shape[1])
            ids = torch.nn.functional.pad(ids, missing, value=self.pad_token_id)
            mask = torch.nn.functional.pad(mask, missing)
        return {"input_ids": ids, "attention_mask": mask}

    def decode(self, input_ids: Sequence[int] | Tensor) -> str:
        """Decode one row of ids to text, without special tokens."""
        ids = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
        text: str = self._backend.decode(ids)
        return text.strip()

    def save(self, path: str | Path) -> Path:
        """Write a `tokenizer.json` for `load_tokenizer`; `path` is the file or its folder."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        return path

    def __setstate__(self, state: dict[str, object]) -> None:
        # A spawned worker unpickles the tokenizer without calling __init__.
        _quiet_in_forked_workers()
        self.__dict__.update(state)


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int = 8192, context_length: int = 32
) -> Tokenizer:
    """Train a lower-case byte-level BPE tokenizer (Sennrich et al. 2016) on captions.

    A caption becomes `[CLS] tokens [SEP]`, padded with [PAD], whose id is 0. Every byte is a token,
    so no text is unknown in any language. The vocabulary does not depend on the order of captions.

    Args:
        captions: the training captions.
        vocab_size: maximum size of the vocabulary: 256 bytes, 3 special tokens, the rest learned;
            few captions give fewer.
        context_length: maximum number of tokens, [CLS] and [SEP] included.

    Raises:
        ValueError: there is no caption with text in it, or a size is too small.

    Example:
        >>> tokenizer = train_tokenizer(["red heart", "red car"], context_length=8)
        >>> tokenizer.decode(tokenizer(["Red Car"])["input_ids"][0])
        'red car'
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, processors, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    # Merging takes time that grows with the square of a word's length.
    texts = [caption[:_LONGEST_TEXT] for caption in captions]
    _check_training(texts, vocab_size)
    _quiet_in_forked_workers()
    # BPE, because the library's WordPiece trainer breaks ties at random.
    backend = FastTokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = _caption_splitter()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_SPECIAL_TOKENS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        special_tokens=[(name, _token_id(backend, name)) for name in (CLS, SEP)],
    )
    return Tokenizer(backend, context_length=context_length, pad_token=PAD)


def _caption_splitter() -> tuple[Normalizer, PreTokenizer]:
    """Lower-case, split words from punctuation, and ignore the amount of white space."""
    from tokenizers import normalizers, pre_tokenizers

    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    words = pre_tokenizers.BertPreTokenizer()
    # The prefix space gives a word the same tokens at the start of a caption as inside it.
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    return normalizer, pre_tokenizers.Sequence([words, as_bytes])


def load_tokenizer(path_or_hub_name: str | Path, context_length: int = 32) -> Tokenizer:
    """Load a tokenizer from a `tokenizer.json`, a folder or the hub.

    Code in a hub repository is never run.

    Raises:
        ValueError: no tokenizer of that name can be loaded, or it is not a fast one.

    Example:
        >>> import tempfile
        >>> path = train_tokenizer(["red heart"]).save(tempfile.mkdtemp())
        >>> load_tokenizer(path, context_length=8)(["red heart"])["input_ids"].shape
        torch.Size([1, 4])
    """
    from tokenizers import Tokenizer as FastTokenizer

    path = Path(path_or_hub_name)
    if path.is_file():
        if path.stat().st_size > _MOST_BYTES:
            raise _load_error(path, ValueError(f"more than {_MOST_BYTES:,} bytes"))
        try:
            backend = FastTokenizer.from_file(str(path))
        except BaseException as error:  # a bare Exception, or a panic, on a malformed file
            if not (isinstance(error, Exception) or _is_panic(error)):
                raise
            raise _load_error(path_or_hub_name, error) from error
        pad_token = (backend.padding or {}).get("pad_token")
        loaded = Tokenizer(backend, context_length=context_length, pad_token=pad_token)
        _check_ids(loaded, path)
        return loaded
    if path.suffix == ".json":
        raise _load_error(path_or_hub_name, FileNotFoundError("no such file"))
    return _load_with_transformers(str(path_or_hub_name), context_length)


def _load_with_transformers(name: str, context_length: int) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(name, error) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise _load_error(name, TypeError(f"{type(loaded).__name__} is not a fast tokenizer"))
    return Tokenizer(backend, context_length=context_length, pad_token=loaded.pad_token)


def _is_panic(error: BaseException) -> bool:
    """Return whether the library, which is written in Rust, broke off: that is no Exception."""
    return type(error).__name__ == "PanicException"


def _check_ids(tokenizer: Tokenizer, path: Path) -> None:
    """Raise ValueError if ids of special tokens are not of the vocabulary, or there are none."""
    ids = tokenizer(["a text"])["input_ids"]
    if not ids.numel() or int(ids.max()) >= tokenizer.vocab_size:
        raise ValueError(
            f"{path}: expected ids below {tokenizer.vocab_size}, got {ids.flatten().tolist()}; "
            "restore the file from a backup, or use another tokenizer"
        )


def _load_error(name: str | Path, error: BaseException) -> ValueError:
    reason = str(error).strip().splitlines()
    return ValueError(
        "tokenizer: expected 'train', the path of a tokenizer.json, or a hub name, "
        f"got {str(name)!r} ({reason[0] if reason else type(error).__name__}); "
        "check the name, or use data.tokenizer=train"
    )


def _check_context_length(context_length: int, special_tokens: int) -> None:
    if context_length <= special_tokens:
        raise ValueError(
            f"context_length: expected more than the {special_tokens} special tokens, "
            f"got {context_length}; pass e.g. context_length=32"
        )


def _check_training(texts: Sequence[str], vocab_size: int) -> None:
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size: expected at least {_SMALLEST_VOCABULARY} (bytes and special tokens), "
            f"got {vocab_size}; pass e.g. vocab_size=8192"
        )
    if not any(text.strip() for text in texts):
        raise ValueError(
            "captions: expected at least one caption with text to learn a vocabulary from, "
            f"got {len(texts)} empty ones; check the training shards"
        )


def _find_pad_token(backend: FastTokenizer) -> str:
    for name in _PAD_NAMES:
        if backend.token_to_id(name) is not None:
            return name
    raise ValueError(
        f"tokenizer: expected a padding token such as {', '.join(_PAD_NAMES)}, got none; "
        "use a tokenizer that has one, or data.tokenizer=train"
    )


def _token_id(backend: FastTokenizer, name: str) -> int:
    token_id = backend.token_to_id(name)
    if token_id is None:
        raise ValueError(
            f"tokenizer: expected the token {name!r} in the vocabulary, got none; "
            "use another tokenizer, or a larger vocab_size"
        )
    return int(token_id)


def _quiet_in_forked_workers() -> None:
    # Its thread pool does not survive a fork: the library warns and becomes serial. Tokenizing a
    # batch takes milliseconds on one thread, so disable the pool before it warns.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
