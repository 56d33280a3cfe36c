"""Compile every kernel for a GPU that need not be there, and show what the compiler made of it.

    python benchmarks/compile_kernels.py [--features 128] [--value-width 32] [--warps 4,8] [--stages 1]

Prints shared memory, registers, stack (spills), matrix instructions and local loads and stores. Needs triton, no GPU;
TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llm_mlp.ops.cross_entropy import kernels as cross_entropy
from llm_mlp.ops.heads import kernels as heads
from llm_mlp.ops.linear_step import kernels as linear_step
from llm_mlp.ops.memorise import kernels as memorise
from llm_mlp.ops.memorise import step_kernels as memorise_steps
from llm_mlp.ops.perceive import kernels as perceive
from llm_mlp.ops.perceive import step_kernels as perceive_steps
from llm_mlp.ops.perception_step import kernels as token_steps
from llm_mlp.ops.wide import kernels as wide

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INTEGERS = (
    "since_ptr",
    "sequence_ptr",
    "start_ptr",
    "length_ptr",
    "bounds_ptr",
    "first_ptr",
    "span_ptr",
    "wild_ptr",
    "slot_ptr",
    "filled_ptr",
    "place_ptr",
    "from_place_ptr",
    "before_place_ptr",
    "last_place_ptr",
)
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
# Pointers to tensors in the inputs' dtype; all others are float32.
NARROW = {"q", "k", "e", "w", "y", "dy", "dq", "dk", "de", "dw", "old_k", "old_w", "before", "dafters", "inverse"}
NARROW |= {"x", "tail", "write", "erase", "dx", "dwrite", "derase", "dread", "dkey", "read", "key", "logit"}
NARROW |= {"residual", *(f"{name}{n}" for name in ("w", "bias", "out") for n in range(3)), "heads"}
NARROW |= {"z", "weight", "phi", "dphi", "dz"}
NARROW |= {"low", "up", "bias", "keys", "values", "value", "share", "gate", "out", "dout", "dshare", "dgate"}


def signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name == "order_ptr":
            kinds[name] = "*i64"
        elif name.startswith("scale") and name.endswith("_ptr"):
            kinds[name] = "*bf16"
        elif constants.get(f"SCALE{name[1:2]}") and name[0] == "w":
            kinds[name] = "*i8"
        elif name in INTEGERS:
            wide = name == "start_ptr" and ("slot_ptr" in kernel.arg_names or "top_ptr" in kernel.arg_names)
            kinds[name] = "*i64" if wide else "*i32"
        elif name in ("e_ptr", "de_ptr") and constants.get("SCALAR"):
            kinds[name] = "*fp32"
        elif name == "target_ptr":
            kinds[name] = "*i64"
        elif name == "rest_ptr":
            kinds[name] = "*fp8e5"
        elif name.endswith("_ptr"):
            kinds[name] = TYPES[dtype] if name.removesuffix("_ptr") in NARROW else "*fp32"
            if name == "inverse_ptr" and dtype == "float16":
                kinds[name] = "*bf16"
        else:
            kinds[name] = "fp32" if name in ("scale", "top", "eps", "cap", "erase_max") else "i32"
    return kinds


def show(
    kernel: Any, constants: dict[str, Any], dtype: str, warps: int, stages: int, capability: int, rows: str = ""
) -> None:
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    kinds = signature(kernel, constants, dtype)
    kinds |= {name: rows for name in ("key_ptr", "value_ptr") if rows and name in kinds}
    # Pointers as torch hands them out: at multiples of 16 bytes, so that loads are wide; rows likewise.
    aligned = {
        (n,): [["tt.divisibility", 16]]
        for n, (name, kind) in enumerate(kinds.items())
        if kind.startswith("*") or (kind == "i32" and name in ("stride", "C", "width"))
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=places, attrs=aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers, stack = (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    counts = "".join(f"{name} {len(re.findall(rf'{name}[ .]', code)):>5}  " for name in ("HGMMA", "HMMA", "LDL", "STL"))
    module = kernel.fn.__module__.split(".")[-2] + (" wild" if constants.get("WILD") is True else "")
    print(
        f"{module + '.' + kernel.fn.__name__:24} warps {warps}  shared {made.metadata.shared:>6}  "
        f"registers {registers[1] if registers else '?':>3}  stack {stack[1] if stack else '?':>5}  {counts}"
    )


def _tiles(kernel: Any) -> dict[str, int]:
    launch = memorise.LAUNCH[kernel.fn.__name__]
    return {"BQ": launch["BQ"], "BK": launch["BK"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--value-width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--warps", default="4,8")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--erase", choices=("scalar", "vector"), default="scalar")
    parser.add_argument("--dtype", choices=tuple(TYPES), default="bfloat16", help="of the inputs")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    precision = "ieee" if dtype == torch.float32 else "tf32"
    launch = perceive.candidates(args.features)[0]
    tile = perceive.tiles(args.features, args.heads, args.value_width, dtype, launch)
    more = {"PRECISION": precision, "FLOOR": perceive.RESET, "SCALAR": args.erase == "scalar"}
    chain = {"J": 64, "JB": 256, "DENSE": False, "ORDER": True, "BLOCKS": True}
    rows = {"R": args.features, "BW": args.heads * args.value_width, "CARRIED": False}
    for warps in map(int, args.warps.split(",")):
        for kernel, constants in (
            (perceive._decays, {"LIMIT": perceive.limit(torch.bfloat16)}),
            (perceive._inverse, {}),
            (perceive._scan, {"KEEP": True, "ENDS": False, "WILD": False}),
            (perceive._scan, {"KEEP": True, "ENDS": False, "WILD": True}),
            (perceive._scan_back, {"RESIDUAL": False, "ENDS": False, "WILD": False}),
            (perceive._scan_back, {"RESIDUAL": True, "ENDS": False, "WILD": True}),
            (perceive._hop, {}),
            (perceive._compose, {"BACK": True, "STEP": 64}),
            (perceive._gradients, {"WILD": False}),
            (perceive._gradients, {"WILD": True}),
        ):
            used = {name: x for name, x in more.items() if name in kernel.arg_names}
            show(
                kernel,
                {**tile[kernel.fn.__name__], **used, **constants},
                args.dtype,
                warps,
                args.stages,
                args.capability,
            )
        for kernel, constants in (
            (memorise._read, {"WIDE": False}),
            (memorise._read_back, {}),
            (memorise._rows_back, {}),
            (memorise._rank, {"J": 256, "STEP": 32, "DENSE": True}),
            (memorise._chain, {**chain, "FROM": 2, "BEFORE": 2, "LAST": 2}),
            (memorise._copy, {"BX": rows["BW"], "BN": 16, "CARRIED": True}),
        ):
            if kernel.fn.__name__ in memorise.LAUNCH:
                constants |= {**rows, **_tiles(kernel), "SOFTMAX": False, "PRECISION": precision}
            show(
                kernel,
                constants,
                args.dtype,
                warps,
                args.stages,
                args.capability,
            )
        first = {"R": 128, "F": max(256, args.features), "SLOPE": True, "PRECISION": precision}
        for kernel in (wide._first, wide._first_back):
            size = {n: wide.LAUNCH[kernel.fn.__name__][n] for n in ("BT", "BF")}
            show(kernel, {**first, **size}, args.dtype, warps, args.stages, args.capability)
        inputs = {"R": args.features, "K": 4, "SLOPE": True, "WRITE": True, "UNITS": True, "UNIT": True}
        inputs |= {"CARRIED": False}
        outputs = {"V": args.value_width, "READ": True, "GATE": True, "PDL": False}
        for kernel, constants in (
            (heads._inputs, inputs),
            (heads._inputs_back, inputs),
            (heads._outputs, outputs),
            (heads._outputs_back, {n: x for n, x in outputs.items() if n != "PDL"}),
            (cross_entropy._loss, {"CAP": True, "GRADIENT": True}),
        ):
            name = kernel.fn.__name__
            launch = cross_entropy.LAUNCH[name] if name == "_loss" else heads.LAUNCH[name]
            size = {n: x for n, x in launch.items() if n in ("BT", "BLOCK", "RUN")}
            if "V" in constants:
                size["BT"] *= max(1, 128 // args.value_width)
            show(kernel, {**constants, **size}, args.dtype, warps, args.stages, args.capability)
        width, one = args.heads * args.value_width, perceive._Sizes.of(args.heads, args.value_width, 1)
        form = {"R": args.features, "BW": width, "BLOCK": 256, "SLOTS": 64}
        matrices = {"NORM": True, "RELU2": False, "RESIDUAL": False, "MATRICES": 3, "PRECISION": "tf32"}
        matrices |= {f"BIAS{n}": True for n in range(3)}
        kinds = ({**matrices, **{f"SCALE{n}": on for n in range(3)}} for on in (False, True))  # bf16, int8
        sizes = one.constants(args.heads, args.value_width)
        token = {n: x for n, x in inputs.items() if n != "CARRIED"} | {"INDEXED": True}
        whole = {"m": args.heads, "V": args.value_width, "RANK": 64, "PARTS": 16, "INDEXED": True}
        for kernel, constants in (
            (perceive_steps._step, {"F": args.features, **sizes, "SCALAR": True, "INDEXED": True}),
            (memorise_steps._step, {**form, "BK": 32, "M": 4, "BM": 4, "SOFTMAX": False, "INDEXED": True, "PARTS": 16}),
            (memorise_steps._close, {**form, "J": 512, "BS": 16, "INDEXED": True, "PARTS": 16}),
            (heads._gates_step, {"BH": 32, "BE": 8, "DECAY": True, "SHARE": True}),
            *((linear_step._linear, {**linear_step.tiles(b, 4096, 1024), **m}) for m in kinds for b in (1, 16)),
            (heads._inputs_step, {**token, "RANK": 0}),
            (heads._inputs_step, {**token, "RANK": 64}),
            (token_steps._states, {**form, **whole, **sizes, "BK": 32, "HEADS": args.heads, "SOFTMAX": False}),
            (token_steps._finish, {**form, **whole, "J": 512, "BS": 16}),
        ):
            constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
            if "PDL" in kernel.arg_names:
                constants = {**constants, "PDL": True}
            show(kernel, constants, args.dtype, warps, args.stages, args.capability)
            if kernel in (memorise_steps._step, memorise_steps._close):  # rows in 8 bits, moved as bytes
                eight_bits = "*fp8e4nv" if kernel is memorise_steps._step else "*u8"
                show(kernel, constants, args.dtype, warps, args.stages, args.capability, eight_bits)


if __name__ == "__main__":
    main()
