"""Published byte-pair vocabularies (GPT-2's pair of files, tiktoken rank files) as `tokenizers` BPE models.

tiktoken stores a rank for every token but no merges. They are recovered by splitting each token's bytes with the
lower ranks only: the last two parts that remain are the pair that made it.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; the message names the file."""


@dataclass(frozen=True)
class Encoding:
    """What a rank file does not say: how text is cut before merging, and where its end-of-text token stands."""

    name: str
    aliases: tuple[str, ...]
    ranks: int
    pattern: str
    eos: int


# tiktoken's patterns in the dialect of Oniguruma, in which ``$`` means end of line (so ``\z``) and ``{1,3}+`` repeats.
ENCODINGS = (
    Encoding(
        "gpt2",
        ("gpt2", "r50k"),
        50_256,
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        50_256,
    ),
    Encoding(
        "cl100k_base",
        ("cl100k",),
        100_256,
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z"""
        r"""|\s*[\r\n]|\s+(?!\S)|\s""",
        100_257,
    ),
    Encoding(
        "o200k_base",
        ("o200k",),
        199_998,
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
        199_999,
    ),
)


def byte_symbols() -> list[str]:
    """GPT-2's printable character for each byte: ``symbols[byte]``."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [""] * 256
    for byte in printable:
        symbols[byte] = chr(byte)
    for n, byte in enumerate(b for b in range(256) if not symbols[b]):
        symbols[byte] = chr(256 + n)
    return symbols


def byte_level(model: models.BPE, pattern: str | None) -> HFTokenizer:
    """A byte-level tokenizer around ``model`` that cuts text with ``pattern`` first."""
    out = HFTokenizer(model)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        out.pre_tokenizer = to_bytes
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        out.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    out.decoder = decoders.ByteLevel()
    return out


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(f"{path}:{number}: expected a base64 token and its rank") from None
    if not ranks:
        raise TokenizerError(f"{path}: the file is empty")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise TokenizerError(f"{path}: {len(missing)} single bytes have no rank (the first is {missing[0]:#04x})")
    if len(set(ranks.values())) < len(ranks):
        raise TokenizerError(f"{path}: two tokens share a rank")
    return ranks


def _encoding_of(path: Path, count: int) -> Encoding:
    for encoding in ENCODINGS:
        if count == encoding.ranks:
            return encoding
    for encoding in ENCODINGS:
        if path.name.startswith(encoding.aliases):
            return encoding
    known = ", ".join(f"{e.name} ({e.ranks})" for e in ENCODINGS)
    raise TokenizerError(
        f"{path}: {count} ranks are none of the known vocabularies: {known}. A rank file does not say how text is "
        "cut; convert this one to a tokenizer.json, or name the file after the vocabulary whose rule it follows"
    )


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that byte-pair training merged, in order. Tokens no pair makes are left out."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = rank, -1
            for i in range(len(parts) - 1):
                found = ranks.get(parts[i] + parts[i + 1], rank)
                if found < best:
                    best, at = found, i
            if at < 0:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _add_special(tokenizer: HFTokenizer, *contents: str) -> None:
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in contents])


def from_ranks(path: Path) -> HFTokenizer:
    """A ``.tiktoken`` file (cl100k_base, o200k_base, r50k_base)."""
    ranks = _read_ranks(path)
    encoding = _encoding_of(path, len(ranks))
    symbols = byte_symbols()

    def spell(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    # The published id of the end of text; a cut-down file gets the next free one.
    eos = max(encoding.eos if len(ranks) == encoding.ranks else 0, max(ranks.values()) + 1)
    fill = [f"<|reserved_{i}|>" for i in sorted(set(range(eos)) - set(ranks.values()))]  # a vocabulary has no holes
    vocab |= {name: int(name[len("<|reserved_") : -2]) for name in fill} | {"<|endoftext|>": eos}
    merges = [(spell(a), spell(b)) for a, b in recover_merges(ranks)]
    # tiktoken takes a piece that is a token as it is, without merging.
    out = byte_level(models.BPE(vocab=vocab, merges=merges, ignore_merges=True), encoding.pattern)
    _add_special(out, *fill, "<|endoftext|>")
    return out


def from_gpt2(folder: Path) -> HFTokenizer:
    """GPT-2's ``encoder.json`` and ``vocab.bpe``."""
    encoder, merge_file = folder / "encoder.json", folder / "vocab.bpe"
    for path in (encoder, merge_file):
        if not path.is_file():
            raise TokenizerError(f"{path}: missing; GPT-2's vocabulary is encoder.json with vocab.bpe beside it")
    try:
        vocab = json.loads(encoder.read_text(encoding="utf8"))
        lines = merge_file.read_text(encoding="utf8").splitlines()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TokenizerError(f"{folder}: encoder.json or vocab.bpe cannot be read: {error}") from None
    pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if not isinstance(vocab, dict) or any(len(pair) != 2 for pair in pairs):
        raise TokenizerError(f"{folder}: encoder.json must map tokens to ids and vocab.bpe hold two symbols a line")
    try:
        model = models.BPE(vocab=vocab, merges=[(a, b) for a, b in pairs])
    except Exception as error:
        raise TokenizerError(f"{merge_file}: does not fit encoder.json: {error}") from None
    out = byte_level(model, ENCODINGS[0].pattern)
    _add_special(out, "<|endoftext|>")
    return out
