"""The Triton kernels down to the machine code of GPUs that need not be here."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsd_megatron.losses.divergences import DivergenceSpec
from tests.unit.losses.kernel_reference import INTERPRETED

pytest.importorskip("triton", reason="the kernels need triton, which CUDA builds of torch bring along")

# What the kernels are compiled for: each formula, of both kinds of terms, with and without a clip.
SPECS = [
    DivergenceSpec(0.5, clip=0.05),
    DivergenceSpec(0.5),
    DivergenceSpec(0),
    DivergenceSpec(0, clip=0.05, clip_mode="bregman"),
    DivergenceSpec(1, clip=0.05),
]
STATISTICS_VARIANTS = [
    {"UNIT_TEMPERATURE": True, "HAS_TARGETS": True},
    {"UNIT_TEMPERATURE": False, "HAS_TARGETS": False},
]


def type_of(argument: str) -> str:
    """Triton's name of the type that a kernel's argument has at run time."""
    if argument in ("student", "teacher", "normaliser", "out", "factors", "shifts"):
        return "*fp32"
    if argument == "targets":
        return "*i64"
    return "i32" if argument in ("rows", "columns", "piece", "student_stride", "teacher_stride") else "fp32"


class TestCompilation:
    """Every kernel down to the machine code of a GPU that need not be here."""

    __test__ = not INTERPRETED

    @pytest.mark.parametrize(("architecture", "specs"), [(80, SPECS[:1]), (90, SPECS), (100, SPECS[:1])])
    @pytest.mark.parametrize("name", ["statistics", "sums", "gradient"])
    def test_kernels_compile_for_cuda(
        self,
        name: str,
        architecture: int,
        specs: list[DivergenceSpec],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        from opsd_megatron.losses import triton_kernels, triton_rows

        monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))  # nothing from earlier runs
        kernel = getattr(triton_kernels, f"{name}_kernel")
        variants = STATISTICS_VARIANTS if name == "statistics" else [triton_rows._variant(spec) for spec in specs]
        for variant in variants:
            constants = {**variant, "BLOCK": triton_rows.BLOCK}
            if variant.get("HAS_TARGETS") is False:
                constants["targets"] = None
            types = {
                argument: "constexpr" if argument in constants else type_of(argument) for argument in kernel.arg_names
            }
            # What triton finds out at a launch with aligned tensors and a vocabulary divisible by 16.
            aligned = {
                (number,): [["tt.divisibility", 16]]
                for number, (argument, kind) in enumerate(types.items())
                if kind.startswith("*") or argument in ("columns", "piece", "student_stride", "teacher_stride")
            }
            source = ASTSource(kernel, types, constants, aligned)
            compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options=triton_rows._LAUNCH)
            assert compiled.asm["cubin"][:4] == b"\x7fELF"
            # Four columns of each side in one load, and no accumulator spilled to memory (LDL: load local).
            assert compiled.asm["ptx"].count("ld.global.v4.b32") == 2
            assert "LDL" not in compiled.asm["sass"]
