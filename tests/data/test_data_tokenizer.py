"""Tokenizers: round trips, special text, streaming, and tiktoken's ranks against tiktoken itself."""

from __future__ import annotations

import base64
import itertools
import json
import os
import tarfile
from pathlib import Path

import pytest
import tiktoken

import llm_mlp.data.tokenizer as module
from llm_mlp.data import Tokenizer, TokenizerError
from llm_mlp.data.ranks import ENCODINGS

TEXTS = [
    "",
    "Hello, world! It's 2024; we've seen 1234567 things, DON'T you think?",
    "naïve façade — “quoted” … Straße ſ's İstanbul",
    "日本語のテキストと中文，한국어도. हिन्दी में लिखा है। ภาษาไทย עברית العربية",
    "emoji 😀😃👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 flags 🇩🇪",
    "   leading and trailing   \n\n\n   \t\t x \r\n\r\n  \n",
    "def f(x):\n    if x > 0:\n        return {'a': [1, 2]}  # ok\n\n\nclass A:\n\tpass\n",
    "<|eos|> <|endoftext|> </s> <eos> <|reserved_100256|>",
    "\x00\x01\x7f\u0085\u00a0\u2003\u200b\ufeff",
    "http://a.b/c//d///e?f=g&h=%20#!!!???...",
]

# The patterns that tiktoken 0.14 uses, in its own dialect.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k_base": ENCODINGS[2].pattern,  # has nothing that the dialects read differently
}


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, 400)


@pytest.fixture(params=["bytes", "trained"])
def tokenizer(request: pytest.FixtureRequest, trained: Tokenizer) -> Tokenizer:
    return Tokenizer.bytes() if request.param == "bytes" else trained


def tiny_ranks(path: Path, size: int = 500) -> dict[bytes, int]:
    """A rank file of byte pairs merged greedily, as a published one is made."""
    ranks = {bytes([b]): r for r, b in enumerate([*range(33, 256), *range(33)])}
    words = [[c.to_bytes() for c in w.encode()] for text in TEXTS for w in text.replace(" ", " ‖").split("‖") if w]
    while len(ranks) < size:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            break
        a, b = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(a + b, len(ranks))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [a + b]
                i += 1
    path.write_text("".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()))
    return ranks


def test_round_trip(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_length(ids) == len(text.encode())
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_bytes_are_their_ids() -> None:
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode("aé") == list("aé".encode())
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)


def test_text_of_special_tokens_stays_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|eos|>b")
    assert tokenizer.eos not in ids
    assert tokenizer.decode(ids) == "a<|eos|>b"
    assert tokenizer.decode([tokenizer.eos, *ids]) == "a<|eos|>b"
    assert tokenizer.decode([tokenizer.eos], skip_special=False) == "<|eos|>"
    assert tokenizer.byte_length([tokenizer.eos]) == 0


def test_training_size_compression_determinism(trained: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    assert trained.vocab_size == 400
    assert trained.fingerprint() == Tokenizer.train(TEXTS * 3, 400).fingerprint()
    assert trained.fingerprint() != Tokenizer.train(TEXTS * 3, 390).fingerprint()
    assert len(trained.encode(TEXTS[1])) < 0.8 * len(TEXTS[1])
    assert len(trained.encode("1234567")) == 7, "every digit is a token"
    assert Tokenizer.train(["ab"], 1000).vocab_size < 300
    assert "too little text" in caplog.text
    with pytest.raises(TokenizerError, match="257"):
        Tokenizer.train(TEXTS, 256)


def test_stream_never_emits_half_a_character(tokenizer: Tokenizer) -> None:
    text = "x😀é日本👩‍👩‍👧y"
    stream, out = tokenizer.stream(), []
    for i in tokenizer.encode(text):
        out.append(stream.step(i))
        assert "\ufffd" not in out[-1]
    assert "".join(out) == text and stream.finish() == ""
    if tokenizer.vocab_size == 257:
        assert out[1:5] == ["", "", "", "😀"], "a character comes out with its last byte"


def test_cut_characters() -> None:
    tokenizer = Tokenizer.bytes()
    ids = tokenizer.encode("é😀")[:4]
    assert tokenizer.byte_length(ids) == 4
    assert tokenizer.decode(ids) == "é\ufffd"
    stream = tokenizer.stream()
    assert [stream.step(i) for i in ids] == ["", "é", "", ""]
    assert stream.finish() == "\ufffd"
    with pytest.raises(TokenizerError, match="id 257 is outside the vocabulary"):
        tokenizer.decode([257])


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["tokenizer.json"]
    for path in (tmp_path / "a", tmp_path / "a" / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.fingerprint() == tokenizer.fingerprint()
        assert (again.eos, again.vocab_size) == (tokenizer.eos, tokenizer.vocab_size)
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_long_texts_in_pieces_give_the_same_ids(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_ranks(tmp_path / "cl100k_tiny.tiktoken")
    text = "\n\n".join(TEXTS) + "\n".join(TEXTS) + "one\ntwo, 2\n\nthree \nfour.\n five\nés\n" * 9
    for each in (tokenizer, Tokenizer.load(tmp_path / "cl100k_tiny.tiktoken")):
        whole = each.encode(text)
        with monkeypatch.context() as patch:
            patch.setattr(module, "PIECE", 8)
            assert len(each._pieces(text)) > 8
            assert each.encode(text) == whole


def test_settings_of_a_file_do_not_cut_documents(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path).encode(TEXTS[1]) == trained.encode(TEXTS[1])


def test_existing_separator_is_used_and_a_missing_one_added(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|eos|>", "</s>"))
    assert (Tokenizer.load(path).eos, Tokenizer.load(path).vocab_size) == (trained.eos, 400)
    path.write_text(path.read_text().replace("</s>", "<pad>"))
    added = Tokenizer.load(path)
    assert (added.eos, added.vocab_size) == (400, 401)
    assert added.decode([added.eos], skip_special=False) == "<|eos|>"


def test_sentencepiece_bytes(tmp_path: Path) -> None:
    pieces = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a"]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": c, "special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}  # noqa: E501
            for i, c in enumerate(pieces[:2])
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": {p: i for i, p in enumerate(pieces)}, "merges": [["▁", "a"]]},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("a é a")
    assert tokenizer.eos == 1
    assert tokenizer.decode(ids) == "a é a"
    assert tokenizer.byte_length(ids) == len(" a é a".encode())


def test_a_decoder_that_loses_bytes_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: decoder .*WordPiece.* not supported"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "encoder.json", "vocab.bpe", "x.tiktoken", "folder"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    with pytest.raises(TokenizerError, match=path.name):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("tokenizer.json", "{", "not a tokenizer.json"),
        ("tokenizer.json", '{"a": 1}', "not a tokenizer.json"),
        ("gpt2.tiktoken", "", "empty"),
        ("gpt2.tiktoken", "IQ== 0\nhello\n", ":2: expected a base64 token"),
        ("gpt2.tiktoken", "IQ== 0\n", "255 single bytes have no rank"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=f"{name}.*{says}" if not says.startswith(":") else name + says):
        Tokenizer.load(tmp_path / name)


def test_malformed_gpt2_pair(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na c\n")
    with pytest.raises(TokenizerError, match=r"vocab\.bpe: does not fit encoder\.json"):
        Tokenizer.load(tmp_path)


def test_lone_surrogate() -> None:
    with pytest.raises(TokenizerError, match="text 1 is not Unicode text"):
        Tokenizer.bytes().encode_batch(["fine", "\ud83d"])


# -- tiktoken ------------------------------------------------------------------------------------------------------


def same_as_tiktoken(path: Path, name: str, ranks: dict[bytes, int], texts: list[str]) -> Tokenizer:
    ours = Tokenizer.load(path)
    theirs = tiktoken.Encoding(
        name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={"<|endoftext|>": ours.eos}
    )
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids == theirs.encode_ordinary(text), text
        assert ours.decode(ids) == text
        assert ours.byte_length(ids) == len(text.encode())
    return ours


@pytest.mark.parametrize("name", list(PATTERNS))
def test_tiny_ranks_are_tiktoken(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.tiktoken"
    ranks = tiny_ranks(path)
    assert len(ranks) == 500
    with path.open("a") as file:  # a token that no merges make is taken where it is a whole piece
        file.write(f"{base64.b64encode(b'qzqzq').decode()} 500\n")
    ranks[b"qzqzq"] = 500
    ours = same_as_tiktoken(path, name, ranks, [*TEXTS, "qzqzq qzqzq qzqzqx"])
    assert ours.encode("qzqzq") == [500]
    assert (ours.eos, ours.vocab_size) == (501, 502)
    assert len(ours.encode(TEXTS[1])) < 0.8 * len(TEXTS[1]), "tokens were merged"


def test_ranks_of_no_known_vocabulary(tmp_path: Path) -> None:
    tiny_ranks(tmp_path / "mine.tiktoken", 300)
    with pytest.raises(TokenizerError, match=r"mine\.tiktoken: 300 ranks are none of the known .*gpt2"):
        Tokenizer.load(tmp_path)


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = Path(os.environ.get("LLM_MLP_SHARED", Path(__file__).parents[3] / "shared"))
    archive = shared / "data" / "tokenizers" / "tokenizers.tar.xz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there (LLM_MLP_SHARED names the folder)")
    folder = tmp_path_factory.mktemp("vocabularies")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "tokenizers"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "size", "eos"),
    [
        ("gpt2", "gpt2/r50k_base.tiktoken", 50_257, 50_256),
        ("cl100k_base", "cl100k/cl100k_base.tiktoken", 100_258, 100_257),
        ("o200k_base", "o200k/o200k_base.tiktoken", 200_000, 199_999),
    ],
)
def test_published_ranks_are_tiktoken(vocabularies: Path, name: str, file: str, size: int, eos: int) -> None:
    path = vocabularies / file
    ranks = {base64.b64decode(t): int(r) for t, r in map(str.split, path.read_text().splitlines())}
    texts = [*TEXTS, Path(module.__file__).read_text(), "".join(map(chr, range(1, 0xD7FF, 7)))]
    ours = same_as_tiktoken(path, name, ranks, texts)
    assert (ours.vocab_size, ours.eos) == (size, eos)
    assert "reserved_" not in ours.decode(range(size)), "what fills a hole in the ids is special"


@pytest.mark.slow
def test_gpt2_pair_is_the_rank_file(vocabularies: Path) -> None:
    pair = Tokenizer.load(vocabularies / "gpt2" / "vocab.bpe")
    ranks = Tokenizer.load(vocabularies / "gpt2" / "r50k_base.tiktoken")
    texts = [*TEXTS, Path(module.__file__).read_text()]
    assert (pair.eos, pair.vocab_size) == (ranks.eos, ranks.vocab_size)
    assert pair.encode_batch(texts) == ranks.encode_batch(texts)
