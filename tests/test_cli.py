"""The command line: every verb, as a user types it, and errors of one line."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_cases import tiny, write_documents

from llm_mlp.cli import main
from llm_mlp.config import dump
from llm_mlp.doctor import Read


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line; returns (exit status, stdout, stderr)."""

    level = logging.getLogger("llm_mlp").level  # verbs set it

    def run(*args: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llm-mlp", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1 if end.code else 0
        finally:
            logging.getLogger("llm_mlp").setLevel(level)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def config(tmp_path) -> Path:
    """A config file of a run of a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny(tmp_path)))
    return path


@pytest.fixture
def trained(call, config, tmp_path) -> Path:
    assert call("train", config, "steps=3", "--quiet")[0] == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    "verb", ["", "train", "demo", "sweep", "prepare", "generate", "info", "eval text", "bench train"]
)
def test_help(call, verb):
    status, out, _ = call(*verb.split(), "--help")
    assert status == 0 and "Usage: " in out
    assert verb or all(name in out for name in ("train", "generate", "eval", "info", "bench", "demo"))


def test_version(call):
    import llm_mlp

    assert call("--version") == (0, llm_mlp.__version__ + "\n", "")


def test_info(call):
    status, out, _ = call("info", "--preset", "900m", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["heads"] == 48
    assert 0.85e9 < facts["parameters_without_embedding"] < 0.95e9
    assert 1.7e9 < facts["flops_per_token"] < 1.95e9
    assert facts["state_bytes"] < 100e6
    wide = json.loads(call("info", "--preset", "900m", "--json", "--dtype", "fp32")[1])
    assert wide["state_bytes"] > facts["state_bytes"] and wide["parameters"] == facts["parameters"]
    every = json.loads(call("info", "--json")[1])
    assert {row["name"] for row in every} >= {"demo", "30m", "900m-transformer"}
    status, out, _ = call("info")
    assert status == 0 and "900m-transformer" in out


def test_train_says_what_is_next(call, config, tmp_path):
    status, out, err = call("train", config, "--out", tmp_path / "mine")
    assert status == 0
    assert f"llm-mlp generate --model {tmp_path / 'mine'}" in out
    assert "mine step 6/6" in err and "held-out" in err


def test_stop_resume_and_init_from(call, config, trained, tmp_path):
    out = tmp_path / "other"
    assert call("train", config, "--out", out, "--stop-after", 2, "--quiet")[0] == 0
    assert "already holds a run" in call("train", config, "--out", out)[2]
    status, text, _ = call("train", config, "--out", out, "--resume", "--quiet")
    assert status == 0 and text.startswith("6 steps")
    status, text, _ = call("train", config, "--out", out, "--resume", "--quiet")
    assert status == 0 and text.startswith("6 steps, finished before, held-out") and "nan" not in text
    assert call("train", config, "--out", tmp_path / "third", "--init-from", trained, "--quiet")[0] == 0


def test_generate_a_form(call, trained, tmp_path):
    (tmp_path / "schema.json").write_text('{"enum": ["yes", "no"]}')
    args = ("generate", "--model", trained, "--seed", 1)
    code, out, _ = call(*args, "--json-schema", tmp_path / "schema.json")
    assert code == 0 and out in ('"yes"\n', '"no"\n')
    code, out, err = call(*args, "--regex", "[0-9]{9}", "--max-tokens", 3)
    assert code == 0 and out.strip().isdigit() and "cut off after 3 tokens" in err
    (tmp_path / "schema.json").write_text('{"type": 5}')
    for more, says in (
        (("--regex", "(a"), "--regex: "),
        (("--json-schema", tmp_path / "schema.json"), "schema.json: "),
        (("--json-schema", tmp_path / "none.json"), "none.json: "),
        (("--json-schema", tmp_path / "schema.json", "--regex", "a"), "give one of them"),
    ):
        code, _, err = call(*args, *more)
        assert code != 0 and says in err


def test_generate(call, trained):
    args = ("generate", "--model", trained, "--max-tokens", 20, "--seed", 1)
    status, out, _ = call(*args, "--prompt", "the cat ")
    assert status == 0 and out.startswith("the cat ")
    assert call(*args, "--prompt", "the cat ")[1] == out
    assert call(*args, "--prompt", "-", stdin="the cat ")[1] == out
    greedy = [call(*args[:-1], seed, "--temperature", 0)[1] for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    for option, value in (("--top-k", 1), ("--top-p", 0.0001), ("--min-p", 1.0)):
        assert call(*args, "--temperature", 1, option, value)[1] == greedy[0], option
    assert call(*args, "--repetition-penalty", 5.0)[0] == 0


def test_eval_text(call, trained, tmp_path):
    path = write_documents(tmp_path)
    status, out, _ = call("eval", "text", path, "--model", trained, "--context", 64, "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["bits_per_byte"] == pytest.approx(facts["loss"] / 0.6931472, rel=1e-5)
    assert facts["tokens"] == facts["bytes"] and list(facts["loss_by_position"]) == ["0-64"]
    status, out, _ = call("eval", "text", path, "--model", trained, "--carry", "--max-tokens", 100)
    assert status == 0 and "bits per byte" in out and "position" in out


def test_sweep(call, config, tmp_path):
    results = tmp_path / "sweep.jsonl"
    status, out, _ = call(
        "sweep", config, "steps=2", "--rates", "0.001,0.01,0.02", "--results", results, "--label", "x", "--quiet"
    )
    assert status == 0 and "config:" in out and "->" in out
    assert len(results.read_text().splitlines()) == 3


def test_prepare(call, config):
    status, out, _ = call("prepare", config)
    facts = json.loads(out)
    assert status == 0 and facts["train_tokens"] > 0 and Path(facts["folder"]).is_dir()


def test_bench(call, tmp_path):
    results = tmp_path / "speed.jsonl"
    status, out, _ = call(
        "bench", "train", "--preset", "demo", "--lengths", "64,96", "--tokens", 64, "--repeats", 1, "--results", results
    )
    assert status == 0 and out.count("ratio") == 2
    status, out, _ = call("bench", "decode", "--preset", "demo", "--contexts", "16", "--steps", 2, "--results", results)
    assert status == 0 and "state" in out
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train-speed", "train-speed", "decode-speed"]
    for line in lines:
        a, b = (line["tokens_per_second"][name] for name in ("demo", "demo-transformer"))
        assert line["ratio"] == pytest.approx(a / b)
        assert {"device", "torch", "commit", "seed", "time"} <= line.keys()


class Metered:
    """Takes the place of `Energy`: ten joules each time it is asked."""

    def __init__(self, device: object) -> None:
        self.now = 0.0

    def joules(self) -> float:
        self.now += 10
        return self.now


@pytest.mark.parametrize("metered", [True, False])
def test_bench_decode_tells_energy_and_plots(call, tmp_path, monkeypatch, metered):
    from llm_mlp import energy
    from llm_mlp.bench import speed

    monkeypatch.setattr(energy, "RAPL", tmp_path / "none")
    monkeypatch.setattr(speed, "WINDOW", 0.05)
    if metered:
        monkeypatch.setattr(speed, "Energy", Metered)
    results, plot = tmp_path / "speed.jsonl", tmp_path / "plots" / "decode.html"
    args = ("--contexts", "16,32", "--batch", "1,2", "--steps", 2, "--results", results, "--plot", plot)
    status, out, _ = call("bench", "decode", "--preset", "demo", *args)
    assert status == 0 and out.count("context") == 4
    assert ("J a token" in out) == metered and ("energy unavailable" in out) != metered
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["batch"], line["context"]) for line in lines] == [(1, 16), (1, 32), (2, 16), (2, 32)]
    for line in lines:
        for part in ("joules_per_token", "watts"):
            assert set(line[part]) == {"demo", "demo-transformer"}
            assert all((value is not None and value > 0) == metered for value in line[part].values())
        for name, steps in line["step_ms"].items():
            assert 0 < steps["p50"] <= steps["p95"] <= steps["p99"]
            assert steps["p50"] == pytest.approx(1e3 * line["batch"] / line["tokens_per_second"][name], abs=1e-3)
    page = plot.read_text()
    kinds = 5 if metered else 3
    # By context for both batches, by batch for both contexts.
    assert page.count("<figure>") == 4 * kinds and "Decoding demo" in page and "Decoding, batch 2" in page
    assert "p95 from" in page  # the plots' descriptions
    assert ("Unavailable here, and not plotted: Energy, batch 1" in page) != metered


def test_settings_of_weights_and_state(call, trained, tmp_path):
    how, store = ("--weights", "int8", "--state", "bf16+8bit"), ("--store", tmp_path / "store")
    text = ("--prompt", "A river", "--max-tokens", 5, "--temperature", 0)
    assert call("context", "create", "one", "--model", trained, "--text", "A river runs.", *store, *how)[0] == 0
    assert call("generate", "--model", trained, *text, "--context", "one", *store, *how)[0] == 0
    status, _, error = call("generate", "--model", trained, *text, "--context", "one", *store)
    assert status == 1 and "made with int8 weights, this model has weights in full" in error
    for flag, value in (("--weights", "int3"), ("--state", "fp8")):
        status, _, error = call("generate", "--model", trained, *text, flag, value)
        assert status == 1 and f"{flag.removeprefix('--')} '{value}': expected" in error
    book, results = tmp_path / "book.txt", tmp_path / "results.jsonl"
    book.write_text("A river runs through it, and through the town. " * 3, encoding="utf8")
    read = ("eval", "text", book, "--model", trained, "--context", 16, "--carry", "--json", "--results", results)
    losses = [json.loads(call(*read, *more)[1])["loss"] for more in ((), ("--steps",), ("--steps", *how))]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == pytest.approx(losses[0], abs=0.05)
    bench = ("bench", "decode", "--preset", "demo", "--contexts", "16", "--steps", 2, "--results", results)
    assert "demo bfloat16:" in call(*bench, *how)[1]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["eval-text"] * 3 + ["decode-speed"]
    assert lines[2]["steps"] and lines[2]["weights"] == "int8" and lines[2]["state"] == "bf16+8bit"
    for what in ("weight_bytes", "state_bytes"):
        assert lines[3][what]["demo"] < 0.65 * lines[3][what]["demo bfloat16"]


@pytest.mark.parametrize("op", ["perceive", "memorise"])
def test_bench_op(call, tmp_path, op):
    results = tmp_path / "op.jsonl"
    args = ("--lengths", "64", "--tokens", 64, "--groups", 1, "--block", 32, "--slots", 8, "--repeats", 1)
    names = ("--dtype", "fp32", "--implementations", "chunked,sdpa-math,sdpa-cudnn")
    status, out, _ = call("bench", "op", op, *args, *names, "--results", results)
    assert status == 0 and "TFLOP/s" in out and out.count("fwd+bwd") == 3
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["implementation"] for row in rows] == ["chunked"] * 2 + ["sdpa-math"] * 2 + ["sdpa-cudnn"] * 2
    for row in rows[:4]:
        assert row["seconds"] > 0 and row["bytes"] > 0 and row["flops"] > 0
        assert row["share_of_roofline"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    for row in rows[4:]:  # a peer that cannot run here is a row that says so
        assert row["seconds"] is None and row["error"]
    assert "unknown op 'attend'" in call("bench", "op", "attend")[2]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["train", "nothing.yaml"], "nothing.yaml: no such config file or recipe; recipes: 30m, demo"),
        (["train", "demo", "optimizer.rate=1"], "optimizer.rate: unknown field; did you mean"),
        (["train", "demo", "steps=many"], "steps: Input should be a valid integer"),
        (["train", "demo", "steps"], "override 'steps': expected NAME=VALUE"),
        (["train", "demo", "model.perception.groups=600"], "perception heads; allowed are 1 to 512"),
        (["train", "demo", "data.sources=[{path: nowhere.txt}]"], "nowhere.txt: no such file or folder"),
        (["info", "--preset", "90m"], "unknown preset '90m'; did you mean"),
        (["info", "--preset", "30m", "--dtype", "int3"], "--dtype 'int3': expected bf16 or fp32"),
        (["generate", "--model", "nowhere"], "nowhere: no such folder"),
        (["sweep", "demo", "--rates", "a,b"], "--rates 'a,b': expected numbers"),
        (["bench", "train", "--lengths", "x"], "'x': expected whole numbers"),
        (["bench", "op", "perceive", "--implementations", "magic"], "unknown implementation 'magic'; known: triton,"),
        (["bench", "train", "--lengths", "0"], "'0': expected numbers of at least 1"),
        (["bench", "train", "--precision", "fp8"], "--precision 'fp8': expected fp32, bf16 or fp16"),
        (["bench", "train", "--preset", "demo-transformer"], "name demo; its twin runs beside it"),
        (["bench", "decode", "--plot", "."], "--plot .: a folder; name a file in it"),
        (["bench", "serve", "--clients", "0"], "'0': expected numbers of at least 1"),
        (["bench", "decode", "--device", "nope"], "device 'nope' cannot be used"),
        (["info", "--preset", "demo", "--model", "x"], "not both"),
        (["train", "demo", "optimizer.lr=.inf"], "optimizer.lr: Input should be a finite number"),
        (["train", "demo", "optimizer.betas=[2,3]"], "betas = (2.0, 3.0) must be at least 0 and below 1"),
        (["train", "demo", "out=2024-01-01"], "not plain numbers, texts, lists and fields"),
        (["train", "demo", 'out=""'], "out: String should have at least 1 character"),
        (["train", "demo", "seed=99999999999999999999999"], "seed: "),
        (["train", "demo", "data.cache_dir=/dev/null/x"], "/dev/null/x: Not a directory"),
        (["eval", "text", "nowhere.txt", "--model", "nowhere"], "nowhere: no such folder"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_are_one_line(call, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(*args)
    assert status == 1
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ") and says in line


def test_errors_of_the_options(call, trained):
    for args, says in (
        (("generate", "--model", trained, "--temperature", -1), "temperature = -1.0 must be at least 0"),
        (("generate", "--model", trained, "--temperature", "inf"), "temperature = inf must be at least 0 and finite"),
        (("generate", "--model", trained, "--device", "meta"), "device 'meta' cannot be used"),
        (("generate", "--model", trained, "--prompt", "a\udcff"), "the prompt is not UTF-8 text"),
        (("eval", "text", trained, "--model", trained, "--context", 0), "--context 0: expected at least 1"),
        (("eval", "text", trained, "--model", trained, "--precision", "fp8"), "--precision 'fp8'"),
    ):
        status, _, err = call(*args)
        assert status == 1 and says in err
    for args in (["generat"], ["generate", "--model", trained, "--seed", 2**70], ["info", "--context", -1]):
        assert call(*args)[0] == 2


def test_a_bug_keeps_its_traceback(call, monkeypatch, trained):
    import llm_mlp.checkpoint

    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(llm_mlp.checkpoint, "load_model", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        call("generate", "--model", trained)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_so_by_its_exit_status(config, tmp_path):
    program = [sys.executable, "-m", "llm_mlp"]
    process = subprocess.Popen([*program, "train", str(config), "steps=100000", "--quiet"])
    metrics = tmp_path / "run/metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    done = subprocess.run(
        [*program, "train", str(config), "steps=100000", "--resume", "--stop-after", "99999999"],
        capture_output=True,
        text=True,
    )
    assert "--stop-after 99999999: expected a step from 1" in done.stderr
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1


def test_contexts(call, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_MLP_CONTEXTS", str(tmp_path / "store"))
    text = tmp_path / "book.txt"
    text.write_text("The old man sat by the river. " * 20)
    model = ("--model", trained)
    status, out, err = call("context", "create", "book", *model, "--file", text)
    assert status == 0 and out.startswith("book: ") and "tokens" in out, err
    assert call("context", "append", "book", *model, "--text", " He had a boat.")[0] == 0
    assert call("context", "fork", "book", "copy")[0] == 0
    listed = json.loads(call("context", "ls", "--json")[1])
    rows = {row["name"]: row for row in listed["contexts"]}
    assert rows.keys() == {"book", "copy"} and rows["book"]["versions"] == 2 and listed["usage"]["objects"] == 2
    assert "2 names, 2 objects" in call("context", "ls")[1]
    # Asking reads nothing again, and says the same as reading everything.
    greedy = ("--temperature", "0", "--max-tokens", "12")
    status, asked, err = call("generate", *model, *greedy, "--context", "book", "--prompt", " It")
    assert status == 0 and f"{rows['book']['tokens']:,} tokens, none read again" in err
    shown = call("context", "show", "book", *model)[1]
    assert "half-lives" in shown and "He had a boat." in shown and "units" in shown
    assert json.loads(call("context", "show", "book", "--json")[1])["id"] == rows["book"]["id"]
    status, out, _ = call("context", "undo", "book", *model)
    assert status == 0 and f"{rows['book']['tokens']:,}" not in out
    assert "are the same" in call("context", "diff", "book", "copy")[1]
    assert json.loads(call("context", "diff", "book", "copy", "--json")[1])["tokens"][1] == rows["copy"]["tokens"]
    assert call("context", "export", "copy", tmp_path / "shared.safetensors")[0] == 0
    assert call("context", "import", tmp_path / "shared.safetensors", "mine")[0] == 0
    assert call("generate", *model, *greedy, "--context", "mine", "--prompt", " It")[1] == asked
    assert call("context", "rm", "copy")[0] == call("context", "rm", "mine")[0] == 0
    assert "removed 0 expired names, 0 objects" in call("context", "gc")[1]
    for args, says in (
        (("context", "create", "book", *model, "--text", "x"), "'book' exists; choose another name, or --replace"),
        (("context", "create", "../x", *model, "--text", "x"), "is no name for a context"),
        (("context", "create", "x", *model), "give the text by --text or by --file"),
        (("context", "create", "x", *model, "--file", tmp_path / "none.txt"), "none.txt: no such file"),
        (("context", "show", "nobody"), "'nobody' does not exist"),
        (("context", "undo", "book", *model), "0 marks to go back to"),
        (("context", "import", text, "x"), "truncated or not a safetensors file"),
        (("generate", *model, "--context", "nobody"), "'nobody' does not exist"),
    ):
        status, out, err = call(*args)
        assert status == 1 and says in err and len(err.splitlines()) == 1, (args, err)
    assert call("context", "create", "book", *model, "--text", "x", "--replace")[0] == 0
    assert call("context", "create", "soon", *model, "--text", "z", "--expires-hours", "1")[0] == 0
    assert call("context", "append", "book", *model, "--text", "y", "--expires-hours", "0")[0] == 0
    assert json.loads(call("context", "ls", "--json")[1])["contexts"][0]["expires"]  # of soon; book's time is over
    assert call("context", "show", "book")[0] == 1
    assert "removed 1 expired names, 2 objects" in call("context", "gc")[1]


@pytest.mark.parametrize("verb", ["create", "append"])
@pytest.mark.parametrize("composable", [(), ("--composable",)])
def test_an_interrupted_reading_goes_on(call, trained, tmp_path, monkeypatch, verb, composable):
    monkeypatch.setenv("LLM_MLP_CONTEXTS", str(tmp_path / "store"))
    for place in ("llm_mlp.infer.prefill.PREFILL", "llm_mlp.context.context.PREFILL"):
        monkeypatch.setattr(place, 32)
    from llm_mlp.context import Store

    text = "A river runs through it, and through the town. " * 9
    model = ("--model", trained)
    for name in ("whole", "parts"):
        if verb == "append":
            assert call("context", "create", name, *model, *composable, "--text", "A boat.")[0] == 0
    options = (*model, *(composable if verb == "create" else ()), "--text", text)
    assert call("context", verb, "whole", *options)[0] == 0
    commit = Store.commit

    def interrupted(self, context, name=None, **more):
        commit(self, context, name, **more)
        if more.get("unfinished"):
            raise KeyboardInterrupt

    read = ("context", verb, "parts", *options, "--every", "64")
    with monkeypatch.context() as m:
        m.setattr(Store, "commit", interrupted)
        assert call(*read)[0] == 130
    assert "unfinished" in call("context", "ls")[1]
    status, _, err = call(*read[:-3], "Another text.", *read[-2:])
    assert status == 1 and "the interrupted reading is of another text; remove it" in err
    assert call(*read)[0] == 0
    whole, parts = (Store().get(name) for name in ("whole", "parts"))
    assert whole.manifest.marks == parts.manifest.marks and bool(parts.transition) == bool(composable)
    own = parts.tensors()
    assert all((t == own[name]).all() for name, t in whole.tensors().items())
    assert "unfinished" not in call("context", "ls")[1]
    if verb == "append":
        assert call("context", "undo", "parts", *model)[0] == 0
        assert Store().get("parts").tokens.equal(Store().get("whole").tokens[: whole.manifest.marks[0]])


@pytest.mark.parametrize("what", ["undo", "recall"])
def test_what_is_read_again_goes_on(call, trained, tmp_path, monkeypatch, what):
    """As a reading into a context does; what is left of one that does not fit any more is said, and not used."""
    monkeypatch.setenv("LLM_MLP_CONTEXTS", str(tmp_path / "store"))
    for place in ("llm_mlp.infer.prefill.PREFILL", "llm_mlp.context.context.PREFILL"):
        monkeypatch.setattr(place, 32)
    monkeypatch.setattr("llm_mlp.cli.contexts.EVERY", 64)
    from llm_mlp.checkpoint import load_model
    from llm_mlp.context import Reader, Store, measure_recall

    model = ("--model", trained)
    assert call("context", "create", "book", *model, "--text", "A river runs through it. " * 30)[0] == 0
    first = Store().get("book")
    assert call("context", "append", "book", *model, "--text", " A boat.")[0] == 0
    second = Store().get("book")
    if what == "undo":
        Store()._delete(first.id)
    commit, made = Store.commit, []

    def interrupted(self, context, name=None, **more):
        made.append(len(context.tokens))
        commit(self, context, name, **more)
        if len(made) == 2:
            raise KeyboardInterrupt

    asked = (
        ("context", "undo", "book", *model)
        if what == "undo"
        else ("context", "show", "book", *model, "--recall", "--json")
    )
    with monkeypatch.context() as m:
        m.setattr(Store, "commit", interrupted)
        assert call(*asked)[0] == 130
        assert made == [64, 128] and f"book.{what}.reading" in call("context", "ls")[1]
        status, out, _ = call(*asked)
        assert status == 0 and made[2] == 192  # on from there
    assert "unfinished" not in call("context", "ls")[1]
    now = Store().get("book")
    if what == "undo":
        assert now.manifest.replayed and all(t.equal(now.tensors()[n]) for n, t in first.tensors().items())
        reader = Reader(*load_model(trained))
        Store().keep_reading(reader.create(list(range(5))), "book.undo")
        assert call("context", "append", "book", *model, "--text", " A boat.")[0] == 0
        Store()._delete(now.id)
        status, _, err = call(*asked)
        assert status == 0 and "what is left of an interrupted reading is not used: " in err
    else:
        found, want = json.loads(out)["recall"], measure_recall(Reader(*load_model(trained)), second).report()
        assert found == json.loads(json.dumps(want)) and now.id == second.id


def test_doctor(call, trained, monkeypatch):
    status, out, _ = call("doctor", "--model", trained, "--tokens", "40", "--device", "cpu")
    assert status == 0 and "FAILED" not in out and "restored from disk" in out and "perceive_step" in out
    status, out, _ = call("doctor", "--model", trained, "--tokens", "40", "--weights", "bf16", "--json")
    assert status == 0 and json.loads(out)["passed"]
    assert {"slots", "differing_slots", "slot_rate", "token_rate", "choices"} <= json.loads(out)["checks"][0].keys()
    assert call("doctor", "--weights", "int3")[0] == 1
    monkeypatch.setattr("llm_mlp.doctor._steps", lambda model, ids: Read(model(ids).logits * 1.5, model.init_state(1)))
    status, out, _ = call("doctor", "--model", trained, "--tokens", "40")
    assert status == 1 and "FAILED" in out


@pytest.mark.parametrize(
    ("verb", "given", "then"),
    [
        ("doctor", {}, "0"),
        ("serve", {}, "0"),
        ("train", {}, "10000"),
        ("bench serve", {}, "0"),
        ("bench decode", {}, "10000"),
        ("doctor", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("train", {"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_threads_do_not_spin_for_long(call, monkeypatch, verb, given, then):
    """Unless the user has said how they wait; before torch is loaded, where a process begins with the verb."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    call(*verb.split(), "--help")
    assert os.environ.get("GOMP_SPINCOUNT") == then
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


def test_composing_and_recall(call, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_MLP_CONTEXTS", str(tmp_path / "store"))
    model = ("--model", trained)
    for name, text in (("a", "The old man sat by the river. "), ("b", "A boat came down the stream. ")):
        assert call("context", "create", name, *model, "--text", text * 12, "--composable")[0] == 0
    assert call("context", "create", "c", *model, "--text", "No more.")[0] == 0
    status, out, _ = call("context", "compose", "both", "a", "b", *model)
    assert status == 0 and out.startswith("both: ")
    assert call("generate", *model, "--context", "both", "--prompt", " It", "--max-tokens", "3")[0] == 0
    status, out, _ = call("context", "compose", "told", "a", "b", *model, "--recall")
    assert status == 0 and out.count("of 64 planted pairs") == 4 and out.count("by chance 1.6%") == 2
    assert "recall of a: composed" in out and "recall of b: composed" in out
    rows = json.loads(call("context", "compose", "json", "b", "a", *model, "--recall", "--json")[1])["recall"]
    assert [row["source"] for row in rows] == ["b", "a"]
    assert all(row[how]["pairs"] == 64 for row in rows for how in ("composed", "concatenated"))
    assert call("context", "create", "brief", *model, "--text", "No.", "--composable")[0] == 0
    status, out, _ = call("context", "show", "a", *model, "--surprise")
    assert (
        status == 0 and "surprise over the text, in 32 parts" in out and "layer  0  " in out and "read again in" in out
    )
    ran = json.loads(call("context", "show", "a", *model, "--surprise", "--json")[1])["surprise"]
    assert len(ran["mean"]) == len(ran["ends"]) == 32 and {len(row["mean"]) for row in ran["layers"]} == {32}
    status, out, _ = call("context", "show", "a", *model, "--recall")
    assert status == 0 and "of 64 planted pairs" in out
    assert json.loads(call("context", "show", "a", *model, "--recall", "--json")[1])["recall"]["pairs"] == 64
    for args, says in (
        (("compose", "x", "a", "c", *model), "read without its transitions"),
        (("compose", "both", "a", *model), "'both' exists"),
        (("compose", "x", "a", "brief", *model, "--recall"), "too short for 64 pairs"),
        (("show", "x"), "does not exist"),  # nothing was stored
        (("show", "a", "--recall"), "--recall asks the model"),
        (("show", "a", "--surprise"), "--surprise asks the model"),
        (("show", "both", *model, "--surprise"), "is composed"),
        (("show", "both", *model, "--recall"), "is composed"),
    ):
        status, _, err = call("context", *args)
        assert status == 1 and says in err, (args, err)
