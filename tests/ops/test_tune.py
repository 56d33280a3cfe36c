"""Which launch of the kernels is trusted: what is checked, remembered, and told."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from op_cases import perceive_inputs

from llm_mlp.ops import backend, checks, perceive, tune

SIZES = (("F", 16), ("m", 2), ("V", 16), ("scalar", False), ("dtype", "bfloat16"))
CHECKED = [  # every op with kernels, at small sizes
    ("perceive", SIZES),
    ("perceive", (*SIZES[:3], ("scalar", True), SIZES[4])),
    ("memorise", (("R", 16), ("width", 32), ("activation", "softmax"), ("dtype", "bfloat16"))),
    ("heads", (("R", 16), ("V", 16), ("dtype", "bfloat16"))),
    ("heads", (("R", 0), ("V", 16), ("dtype", "bfloat16"))),
    ("first_layer", (("R", 16), ("F", 32), ("dtype", "bfloat16"))),
    ("heads_step", (("R", 16), ("V", 16), ("dtype", "bfloat16"))),
    ("gates_step", (("R", 0), ("V", 0), ("dtype", "bfloat16"))),
    ("linear_step", (("eight", False), ("dtype", "bfloat16"))),
    ("linear_step", (("eight", True), ("dtype", "bfloat16"))),
    ("cross_entropy", (("dtype", "bfloat16"),)),
    ("perceive_step", (*SIZES[:3], ("scalar", True), ("state", "float32"), ("dtype", "bfloat16"))),
    *(
        (
            "memorise_step",
            (("R", 16), ("width", 32), ("block", 8), ("slots", 4), ("activation", "relu2"), ("rows", rows),
             ("dtype", "bfloat16")),
        )
        for rows in ("bfloat16", "float8_e4m3fn")
    ),
    (
        "perception_step",
        (("R", 16), ("m", 2), ("V", 16), ("taps", 4), ("rank", 8), ("block", 8), ("slots", 4), ("activation", "relu2"),
         ("dtype", "bfloat16"), ("states", "float32"), ("rows", "bfloat16")),
    ),
]  # fmt: skip


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The launches that are checked; those in ``wrong`` fail."""
    monkeypatch.setenv("LLM_MLP_CACHE", str(tmp_path))
    again(monkeypatch)
    seen: list[int] = []
    wrong: set[int] = set()

    def check(op, sizes, way, device):
        number = tune.plans().index(way)
        seen.append(number)
        return tune.Found(["case 0, tensor 1: rms error 3, of chunked 0.01"] if number in wrong else [], 128, 1)

    monkeypatch.setattr(tune, "check_apart", check)
    monkeypatch.setattr(tune, "newest_assembler", lambda: "/new/ptxas")
    return seen, wrong


def again(monkeypatch):
    """As a new process would find it."""
    monkeypatch.setattr(tune, "_known", {})
    monkeypatch.setattr(tune, "_rows", {})


def test_what_passed_is_remembered(asked, monkeypatch, caplog):
    seen, _ = asked
    with caplog.at_level(logging.INFO, "llm_mlp.ops"):
        assert tune.untrusted("perceive", SIZES, "cpu") is None
    assert tune.plan("perceive", SIZES) == tune.Plan(0, "/new/ptxas")
    assert "1 of 128 memorised rows are other than float64 chooses" in caplog.text
    assert [row["differing"] for row in tune._read(tune._cache_file()).values()] == [1]
    again(monkeypatch)
    assert tune.untrusted("perceive", SIZES, "cpu") is None
    assert seen == [0]
    assert tune.untrusted("perceive", (*SIZES[:1], ("m", 4), *SIZES[2:]), "cpu") is None
    assert seen == [0, 0]  # other sizes are another check


def test_the_next_plan_stands_in(asked, monkeypatch):
    seen, wrong = asked
    wrong.update((0, 1))
    assert tune.untrusted("perceive", SIZES, "cpu") is None
    assert tune.plan("perceive", SIZES) == tune.Plan(1, "/new/ptxas") and seen == [0, 1, 2]
    again(monkeypatch)
    assert tune.untrusted("perceive", SIZES, "cpu") is None
    assert tune.plan("perceive", SIZES) == tune.Plan(1, "/new/ptxas") and seen == [0, 1, 2]


def test_wrong_kernels_are_not_trusted_and_it_is_said(asked, monkeypatch, caplog):
    asked[1].update(range(4))
    with caplog.at_level(logging.WARNING, "llm_mlp.ops"):
        reason = tune.untrusted("perceive", SIZES, "cpu")
    assert reason and "failed their check on this device" in reason and "tensor 1: rms error 3" in reason
    assert "the kernels are wrong here for F = 16, m = 2, V = 16" in caplog.text
    again(monkeypatch)
    assert tune.untrusted("perceive", SIZES, "cpu") == reason


def test_choices_go_with_a_run_to_another_cache(asked, monkeypatch, tmp_path):
    """Through JSON, as in a checkpoint; but only launches that there are here."""
    seen, wrong = asked
    wrong.update((0, 1))
    assert tune.untrusted("perceive", SIZES, "cpu") is None
    rows = json.loads(json.dumps(tune.choices()))
    wrong.clear()
    monkeypatch.setenv("LLM_MLP_CACHE", str(tmp_path / "elsewhere"))
    again(monkeypatch)
    tune.go_by(rows)
    assert tune.untrusted("perceive", SIZES, "cpu") is None and seen == [0, 1, 2]
    assert tune.plan("perceive", SIZES) == tune.Plan(1, "/new/ptxas") and tune.choices() == rows
    again(monkeypatch)
    tune.go_by({key: row | {"plan": [1, "/somebody/elses/ptxas"]} for key, row in rows.items()})
    assert tune.untrusted("perceive", SIZES, "cpu") is None and seen == [0, 1, 2, 0]


@pytest.mark.parametrize("broken", ["", "[]", '{"perceive'])
def test_a_broken_file_is_made_anew(asked, tmp_path, broken):
    (tmp_path / "kernels.json").write_text(broken)
    assert tune.untrusted("perceive", SIZES, "cpu") is None
    (key,) = json.loads((tmp_path / "kernels.json").read_text())
    assert key.startswith("perceive F=16 m=2 V=16 scalar=False dtype=bfloat16 cpu ")


def test_a_file_that_cannot_be_written_is_said(asked, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLM_MLP_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "llm_mlp.ops"):
        assert tune.untrusted("perceive", SIZES, "cpu") is None
    assert "cannot be written" in caplog.text


def test_auto_asks_before_it_chooses(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.delenv(backend.OVERRIDE, raising=False)
    monkeypatch.setattr(backend, "_no_triton", lambda device: None)
    assert backend.choose("perceive", "auto", cuda) == "triton"
    assert backend.choose("perceive", "auto", cuda, None, lambda: "wrong here") == "chunked"
    assert backend.choose("perceive", "auto", cuda, "F = 24", lambda: pytest.fail("nothing to ask")) == "chunked"
    assert backend.choose("perceive", "triton", cuda, None, lambda: "wrong here") == "triton"  # as told
    monkeypatch.setenv(backend.OVERRIDE, "triton")
    assert backend.choose("perceive", "auto", cuda, None, lambda: "wrong here") == "triton"
    assert backend.choose("perceive", "auto", cuda, "F = 24") == "chunked"  # it would compute something else
    monkeypatch.setenv(backend.OVERRIDE, "chunked")
    assert backend.choose("perceive", "auto", cuda) == "chunked"
    monkeypatch.setenv(backend.OVERRIDE, "reference")
    with pytest.raises(ValueError, match="LLM_MLP_BACKEND=reference: expected chunked or triton"):
        backend.choose("perceive", "auto", cuda)


def test_compare_tells_a_wrong_tensor():
    truth = torch.randn(2000, dtype=torch.float64)
    near, yard = (truth + 1e-3 * torch.randn(2000, dtype=torch.float64) for _ in range(2))
    assert checks.compare("y", [near.float()], [yard.float()], [truth]) == []
    off = near.clone()
    off[7] += 0.04
    assert "largest error" in checks.compare("y", [off.float()], [yard.float()], [truth])[0]
    assert checks.compare("y", [near.mul(torch.inf)], [yard], [truth]) == ["y: not finite"]


def test_other_choices_are_counted():
    truth = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    truth[1, 2, 5:] = 0  # not in use
    got = truth.flip(2).bfloat16()  # order and rounding do not matter
    assert checks.choices(got, truth) == (45, 0)
    got[0, 1, 4] = torch.randn(16)
    got[1, 0, 0] = got[1, 0, 1]
    assert checks.choices(got, truth) == (45, 2)


@pytest.mark.parametrize("op", ["memorise", "memorise_step", "perception_step"])
def test_a_check_counts_other_choices(monkeypatch, op):
    """With plain torch in the kernels' place, which in one slot of each case keeps another token."""
    cases, sizes = checks._CASES[op], next(sizes for name, sizes in CHECKED if name == op)

    def kernels(case, wrong):
        def run(backend):
            def call(*inputs):
                found = list(case.run("chunked")(*inputs))
                if wrong and backend == "triton":
                    keys = found[case.keys] = found[case.keys].clone()
                    keys[1, 0, 0] = keys[1, 0, 1]
                return found

            return call

        return case._replace(run=run)

    for wrong in (False, True):
        monkeypatch.setitem(checks._CASES, op, lambda wrong=wrong, **given: [kernels(c, wrong) for c in cases(**given)])
        found = checks.check(op, sizes, "cpu")
        assert (found.differing, not found.failures) == ((2, False) if wrong else (0, True))
        assert found.slots >= 2 * 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "sizes", "number"),
    [*((op, sizes, 0) for op, sizes in CHECKED), (*CHECKED[1], 1), (*CHECKED[2], 1)],  # the safe table of two
)
def test_the_check_itself(monkeypatch, op, sizes, number):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = tune.check_apart(op, sizes, tune.Plan(number), "cpu")
    assert found.failures == [] and found.differing == 0
    assert bool(found.slots) == (op in ("memorise", "memorise_step", "perception_step"))


def test_every_op_with_kernels_has_a_check():
    assert {op for op, _ in CHECKED} == checks._CASES.keys()


def test_a_check_that_dies_says_how(monkeypatch):
    monkeypatch.setattr(tune.sys, "executable", "/bin/false")
    assert tune.check_apart("perceive", SIZES, tune.Plan(), "cpu").failures == ["the check ended with 1: "]
    monkeypatch.setattr(tune.sys, "executable", "/nowhere/python")
    assert "the check did not start" in tune.check_apart("perceive", SIZES, tune.Plan(), "cpu").failures[0]


def test_the_second_launch_computes_the_same(monkeypatch):
    pytest.importorskip("triton")
    inputs = perceive_inputs(1, 70, 1, 16, 2, 16, dtype=torch.float32)
    if torch.cuda.is_available():
        inputs = [x.cuda() for x in inputs]
    first = perceive(*inputs, backend="triton")[0]
    monkeypatch.setitem(tune._known, ("perceive", (*SIZES[:4], ("dtype", "float32"))), (tune.Plan(1), ""))
    assert torch.allclose(perceive(*inputs, backend="triton")[0], first, atol=1e-5)


def test_the_question_is_asked_while_tracing(asked):
    def f(x):
        return x + 1 if tune.untrusted("perceive", SIZES, str(x.device)) is None else x

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2)) and asked[0] == [0]


def fake_assembler(folder, name, number):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho Cuda compilation tools, release X, V{number}\n")
    (folder / name).chmod(0o755)


def test_the_newest_assembler_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv(tune.ASSEMBLER, raising=False)
    own = tmp_path / "triton" / "backends" / "nvidia" / "bin"
    fake_assembler(own, "ptxas", "12.8.93")
    (tmp_path / "triton" / "__init__.py").write_text("")
    monkeypatch.setattr(
        tune, "find_spec", lambda name: type("Spec", (), {"origin": str(tmp_path / "triton" / "__init__.py")})
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(tune.shutil, "which", lambda name: None)
    monkeypatch.setattr(tune, "SYSTEM_ASSEMBLER", str(tmp_path / "nothing"))
    find = tune.newest_assembler.__wrapped__
    fake_assembler(own, "ptxas-blackwell", "12.8.61")
    assert find() == ""  # older
    fake_assembler(own, "ptxas-blackwell", "13.1.80")
    assert find() == str(own / "ptxas-blackwell")
    fake_assembler(tmp_path / "cuda" / "bin", "ptxas", "13.10.1")
    assert find() == str(tmp_path / "cuda" / "bin" / "ptxas")
    monkeypatch.setenv(tune.ASSEMBLER, "/chosen/ptxas")
    assert find() == ""


def test_a_plan_compiles_with_its_assembler(monkeypatch):
    monkeypatch.setenv(tune.ASSEMBLER, "/before")
    with tune.Plan(0, "/new/ptxas").compiling():
        assert tune.os.environ[tune.ASSEMBLER] == "/new/ptxas"
    assert tune.os.environ[tune.ASSEMBLER] == "/before"
    with tune.Plan().compiling():
        assert tune.os.environ[tune.ASSEMBLER] == "/before"
    tables = [{"_scan": {"num_warps": 4}}, {"_scan": {"num_warps": 2}}]
    assert tune.Plan(1).of(tables) == {"_scan": {"num_warps": 2}}
    assert tune.Plan(0, "/new/ptxas").of(tables)["_scan"].keys() == {"num_warps", "ptx_options"}
