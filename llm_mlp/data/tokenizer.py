"""Text to ids and back. Every tokenizer, bytes and tiktoken ranks too, is one ``tokenizer.json``."""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from llm_mlp.data.ranks import ENCODINGS, TokenizerError, byte_level, byte_symbols, from_gpt2, from_ranks

logger = logging.getLogger("llm_mlp.data")

Spelling = bytes  # within the class, `bytes` is a method

EOS = "<|eos|>"
EOS_NAMES = (EOS, "<|endoftext|>", "<eos>", "</s>")
TEMPLATE_FILE, NAMES_FILE = "chat_template.jinja", "tokenizer_config.json"
# Of a tokenizer_config.json: the tokens that a chat template may call by these names.
TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")

# GPT-2's rule, but every digit alone: a small vocabulary does not spend itself on years and page numbers.
TRAIN_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# A text is encoded in pieces of about this many characters, cut where all patterns above certainly cut.
PIECE = 1 << 20
_CUT = re.compile(r"(?<=\S\n)(?=[^\W\d_])")
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def read_template(path: Path) -> str:
    """The text of a chat template's file, its line ends as they are.

    Raises:
        TokenizerError: it cannot be read.
    """
    try:
        return path.expanduser().read_bytes().decode("utf8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: the chat template cannot be read ({error})") from None


def _read_chat(folder: Path) -> tuple[str | None, dict[str, str]]:
    """What a tokenizer's folder says of chats: the template, and the names of tokens."""
    config = folder / NAMES_FILE
    settings: dict[str, Any] = {}
    if config.is_file():
        try:
            settings = dict(json.loads(config.read_text(encoding="utf8")))
        except (OSError, ValueError, TypeError) as error:
            raise TokenizerError(f"{config}: cannot be read ({error})") from None
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((row["template"] for row in source if row.get("name") == "default"), None)
    if (folder / TEMPLATE_FILE).is_file():
        source = read_template(folder / TEMPLATE_FILE)
    names = {}
    for name in TOKEN_NAMES:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[name] = value
    return source, names


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", ())))


class Tokenizer:
    """A `tokenizers` tokenizer with one separator token, whose text never turns into special ids.

    Beside its ids it carries what its folder says of chats: ``chat_template`` (Jinja, or None) and ``token_names``
    (``eos_token`` and others, as the template may call them). `llm_mlp.data.chat` makes ids of conversations by them;
    the fingerprint, which is about the ids of texts, leaves them out.
    """

    def __init__(self, inner: HFTokenizer, origin: str = "tokenizer") -> None:
        # Settings a file may carry for other uses; left on, they would cut or pad documents without a word.
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self._special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        names = {token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        if not any(name in names for name in EOS_NAMES):
            inner.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
            names[EOS] = max(inner.get_added_tokens_decoder())
            self._special.add(names[EOS])
        self.eos: int = next(names[name] for name in EOS_NAMES if name in names)
        self.special_tokens: dict[str, int] = names
        self.chat_template: str | None = None
        self.token_names: dict[str, str] = {}
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        spec = json.loads(inner.to_str())
        kinds = _decoder_kinds(spec["decoder"])
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            raise TokenizerError(
                f"{origin}: decoder {sorted(kinds) or None} is not supported; byte-level tokenizers and SentencePiece "
                "ones (ByteFallback or Metaspace) are, because they give back the bytes they were given"
            )
        self._strips_space = "Strip" in kinds or "Metaspace" in kinds
        self._cuttable = self._byte_level and spec["normalizer"] is None and self._cuts_lines(spec)

    @staticmethod
    def _cuts_lines(spec: dict[str, Any]) -> bool:
        """Whether no token reaches over the end of a line into a letter, so that long texts may be cut there."""
        if spec["model"]["type"] != "BPE":
            return False
        if not spec["model"]["merges"]:
            return True
        patterns = {TRAIN_PATTERN, *(encoding.pattern for encoding in ENCODINGS)}
        parts = (spec["pre_tokenizer"] or {}).get("pretokenizers", ())
        return bool(parts) and parts[0]["type"] == "Split" and parts[0]["pattern"].get("Regex") in patterns

    # -- making ---------------------------------------------------------------------------------------------------

    @classmethod
    def bytes(cls) -> Tokenizer:
        """The 256 bytes (id = byte) and the separator."""
        vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        return cls(byte_level(models.BPE(vocab=vocab, merges=[]), None))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
        """Byte-level BPE. The separator counts as one of ``vocab_size``; the same texts give the same tokenizer."""
        if vocab_size < 257:
            raise TokenizerError(f"vocab_size = {vocab_size}: 256 bytes and the separator need at least 257")
        inner = byte_level(models.BPE(), TRAIN_PATTERN)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(EOS, special=True, normalized=False)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=progress,
        )
        inner.train_from_iterator(texts, trainer=trainer)
        out = cls(inner)
        if out.vocab_size < vocab_size:
            logger.warning(
                "the text gave a vocabulary of %d tokens, not %d: too little text", out.vocab_size, vocab_size
            )
        return out

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """A folder or its tokenizer.json; a ``.tiktoken`` rank file; GPT-2's encoder.json and vocab.bpe.

        A chat template comes with it: ``chat_template.jinja`` beside the file, else ``chat_template`` in
        ``tokenizer_config.json``.

        Raises:
            TokenizerError: missing, damaged, or of a kind that is not supported.
        """
        path = Path(path).expanduser()
        if path.is_dir():
            path = cls._find(path)
        if not path.is_file():
            raise TokenizerError(f"{path}: no such tokenizer file")
        out = cls(cls._read(path), str(path))
        out.chat_template, out.token_names = _read_chat(path.parent)
        return out

    @staticmethod
    def _read(path: Path) -> HFTokenizer:
        if path.suffix == ".tiktoken":
            return from_ranks(path)
        if path.name in ("encoder.json", "vocab.bpe"):
            return from_gpt2(path.parent)
        try:
            return HFTokenizer.from_str(path.read_text(encoding="utf8"))
        except Exception as error:
            raise TokenizerError(f"{path}: not a tokenizer.json: {error}") from None

    @staticmethod
    def _find(folder: Path) -> Path:
        for name in ("tokenizer.json", "encoder.json", "vocab.bpe"):
            if (folder / name).is_file():
                return folder / name
        ranks = sorted(folder.glob("*.tiktoken"))
        if len(ranks) == 1:
            return ranks[0]
        found = f"{len(ranks)} .tiktoken files (name one of them)" if ranks else "no tokenizer.json"
        raise TokenizerError(f"{folder}: the folder holds {found}")

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` into ``folder``; with a chat template also that, as `load` finds it."""
        files = {"tokenizer.json": self._inner.to_str(pretty=True)}
        if self.chat_template is not None:
            files[TEMPLATE_FILE] = self.chat_template
        if self.token_names:
            files[NAMES_FILE] = json.dumps(self.token_names, indent=1)
        for name, text in files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{name}.{os.getpid()}")
            # The template is part of what a run's data are made by: not even its line ends may change.
            temporary.write_text(text, encoding="utf8", newline="")
            os.replace(temporary, target)

    def with_chat_template(self, source: str | None) -> Tokenizer:
        """The same tokenizer with another chat template."""
        out = copy.copy(self)
        out.chat_template = source
        return out

    @cached_property
    def _fingerprint(self) -> str:
        canonical = json.dumps(json.loads(self._inner.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def fingerprint(self) -> str:
        """sha256 of the tokenizer's canonical JSON."""
        return self._fingerprint

    # -- encoding -------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone: nothing is added, and the spelling of a special token is ordinary text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text; runs on all cores."""
        parts = [(number, part) for number, text in enumerate(texts) for part in self._pieces(text)]
        out: list[list[int]] = [[] for _ in texts]
        begin = 0
        while begin < len(parts):
            # An encoding takes many times the memory of its text, so only a few long pieces are under way at once.
            end, size = begin, 0
            while end < len(parts) and size < 8 * PIECE:
                size += len(parts[end][1])
                end += 1
            try:
                found = self._inner.encode_batch_fast([part for _, part in parts[begin:end]], add_special_tokens=False)
            except TypeError:
                raise TokenizerError(
                    f"text {self._bad_text(texts)} is not Unicode text (half a surrogate pair)"
                ) from None
            for (number, _), encoding in zip(parts[begin:end], found, strict=True):
                out[number] += encoding.ids
            begin = end
        return out

    def _pieces(self, text: str) -> list[str]:
        """``text`` in parts that encode to the ids of the whole; bounds the memory a long document needs."""
        if not self._cuttable or len(text) <= PIECE:
            return [text]
        cuts = [0]
        while len(text) - cuts[-1] > PIECE and (cut := _CUT.search(text, cuts[-1] + PIECE)):
            cuts.append(cut.start())
        return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]

    @staticmethod
    def _bad_text(texts: Sequence[str]) -> int:
        for number, text in enumerate(texts):
            if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
                return number
        return -1

    # -- decoding -------------------------------------------------------------------------------------------------

    @cached_property
    def _spelling(self) -> list[Spelling]:
        """The bytes of every id."""
        out = [b""] * self.vocab_size
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        added = self._inner.get_added_tokens_decoder()
        for token, i in self._inner.get_vocab(with_added_tokens=True).items():
            if i in added:
                out[i] = added[i].content.encode()
            elif self._byte_level:
                out[i] = b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in token)
            elif match := _FALLBACK_BYTE.fullmatch(token):
                out[i] = bytes([int(match[1], 16)])
            else:
                out[i] = token.replace("▁", " ").encode()
        return out

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of every id, int32 [vocab_size]; 0 for special tokens."""
        lengths = np.array([len(spelling) for spelling in self._spelling], dtype=np.int32)
        lengths[sorted(self._special)] = 0
        return lengths

    @property
    def drops_first_space(self) -> bool:
        """Whether decoding leaves out a space ahead of the first token (SentencePiece puts one there)."""
        return self._strips_space

    def spelling(self, i: int) -> Spelling:
        """The bytes that an id stands for, a special token's name included."""
        return self._bytes_of(i, False, False)

    def byte_length(self, ids: Sequence[int] | np.ndarray) -> int:
        """UTF-8 bytes that ``ids`` stand for, exact also where they split a character; special tokens have none.

        The space that SentencePiece tokenizers put ahead of a text counts.
        """
        return int(self.token_bytes[np.asarray(ids, dtype=np.int64)].sum())

    def _bytes_of(self, i: int, skip_special: bool, first: bool) -> Spelling:
        if not 0 <= i < self.vocab_size:
            raise TokenizerError(f"id {i} is outside the vocabulary of {self.vocab_size}")
        if i in self._special:
            return b"" if skip_special else self._spelling[i]
        return self._spelling[i].removeprefix(b" ") if first and self._strips_space else self._spelling[i]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.step(int(i)) for i in ids]) + stream.finish()

    def stream(self, *, skip_special: bool = True) -> DecodeStream:
        """A decoder that takes one id at a time."""
        return DecodeStream(self, skip_special)


class DecodeStream:
    """Incremental decoding: text comes out as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special, self._first = tokenizer, skip_special, True
        self._utf8 = codecs.getincrementaldecoder("utf8")(errors="replace")

    def step(self, i: int) -> str:
        """The text that ``i`` completes; empty while a character is unfinished."""
        spelling = self._tokenizer._bytes_of(i, self._skip_special, self._first)
        self._first = self._first and i in self._tokenizer._special
        return self._utf8.decode(spelling)

    def finish(self) -> str:
        """U+FFFD if the ids ended within a character, else nothing."""
        return self._utf8.decode(b"", final=True)
