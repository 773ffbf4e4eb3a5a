"""FLOPs and bytes of instructions, against products and arrays of known size."""

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from jaxllm.plan.chips import CHIPS
from jaxllm.plan.estimate import total_work
from jaxllm.plan.hlo import Array, Instruction, parse_hlo
from jaxllm.plan.kernels import state_kernel_costs
from jaxllm.plan.runs import list_runs
from jaxllm.plan.traffic import Work, _convolution_flops, kernels_without_cost, work_of

TEXTS = Path(__file__).parent / "hlo"


def total(text, chip):
    module = parse_hlo(text)
    return total_work(module, list_runs(module), CHIPS[chip])


def work(lines, name, *, on_chip=True):
    """Return the work of one instruction of an entry computation."""
    text = "HloModule test\n\n" + lines
    module = parse_hlo(text)
    entry = module.computations[module.entry]
    return work_of(module, entry, entry.instructions[name], on_chip=on_chip)


def test_a_compiled_training_step_costs_its_matrix_products():
    # Two products of 1024 x 4096 x 8192 in each of 4 layers: forward, the first again, and two gradients of each.
    text = (TEXTS / "v5e_4x4_staged.txt").read_text()
    assert total(text, "v5e").flops == 2 * 1024 * 4096 * 8192 * 4 * (2 + 1 + 4)


def test_products_of_the_gpu_and_cpu_programs():
    assert total((TEXTS / "h100_2x4.txt").read_text(), "h100").flops == 5 * 2 * 2048 * 4096 * 4096
    assert total((TEXTS / "cpu_2x4.txt").read_text(), "h100").flops == 5 * 2 * 8 * 64 * 64


@given(batch=st.integers(1, 3), rows=st.integers(1, 5), inner=st.integers(1, 5), columns=st.integers(1, 5))
def test_a_batched_product_written_as_a_convolution(batch, rows, inner, columns):
    # As TPU compilers write it: the batch is a dimension of the window, which overlaps with one input row at a time.
    window = f"size={batch} stride={max(batch - 1, 1)} lhs_dilate={batch}"
    tail = f", window={{{window}}}, dim_labels=0bf_0io->0bf, metadata={{}}"
    left, right = Array("bf16", (batch, rows, inner)), Array("bf16", (batch, inner, columns))
    product = Instruction("p", "convolution", (Array("bf16", (batch, rows, columns)),), ("a", "b"), "", tail)
    assert _convolution_flops(product, left, right) == 2 * batch * rows * inner * columns


@given(
    size=st.integers(1, 9),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    pads=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_a_convolution_does_not_multiply_padding(size, kernel, stride, pads):
    length = (size + sum(pads) - kernel) // stride + 1
    if length < 1:
        return
    tail = f", window={{size={kernel} stride={stride} pad={pads[0]}_{pads[1]}}}, dim_labels=b0f_0io->b0f, metadata={{}}"
    conv = Instruction("c", "convolution", (Array("f32", (2, length, 5)),), ("a", "b"), "", tail)
    ones = np.pad(np.ones(size), pads)
    hit = sum(ones[i * stride : i * stride + kernel].sum() for i in range(length))
    assert _convolution_flops(conv, Array("f32", (2, size, 3)), Array("f32", (kernel, 3, 5))) == 2 * 2 * 5 * 3 * hit


def test_this_cpu_compiler_counts_as_we_do():
    def products(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    shapes = jax.ShapeDtypeStruct((8, 16), "float32"), jax.ShapeDtypeStruct((3, 16, 16), "float32")
    assert total(jax.jit(products).lower(*shapes).compile().as_text(), "h100").flops == 3 * 2 * 8 * 16 * 16


STACK = """%slice_of (stack: bf16[8,64,64], i: s32[]) -> bf16[1,64,64] {
  %stack = bf16[8,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = bf16[1,64,64]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}
}

%update_of (old: bf16[8,64,64], new: bf16[1,64,64], i.1: s32[]) -> bf16[8,64,64] {
  %old = bf16[8,64,64]{2,1,0} parameter(0)
  %new = bf16[1,64,64]{2,1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %put = bf16[8,64,64]{2,1,0} dynamic-update-slice(%old, %new, %i.1, %zero.1, %zero.1)
}

ENTRY %main (w: bf16[8,64,64], n: s32[]) -> bf16[8,64,64] {
  %w = bf16[8,64,64]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %read = bf16[1,64,64]{2,1,0} fusion(%w, %n), kind=kLoop, calls=%slice_of
  %near = bf16[1,64,64]{2,1,0:S(1)} fusion(%w, %n), kind=kLoop, calls=%slice_of
  %fetch = (bf16[1,64,64]{2,1,0:S(1)}, bf16[1,64,64]{2,1,0}, u32[]) copy-start(%read)
  %fetched = bf16[1,64,64]{2,1,0:S(1)} copy-done(%fetch)
  %twice = bf16[1,64,64]{2,1,0} add(%fetched, %read)
  %view = bf16[64,64]{1,0} bitcast(%twice)
  ROOT %write = bf16[8,64,64]{2,1,0} fusion(%w, %twice, %n), kind=kLoop, calls=%update_of
}
"""


@pytest.mark.parametrize(
    ("name", "pieces", "scalars"),
    [
        ("read", 2, 1),
        ("near", 1, 1),
        ("fetch", 1, 0),
        ("fetched", 0, 0),
        ("twice", 2, 0),
        ("view", 0, 0),
        ("write", 2, 1),
    ],
)
def test_of_a_stack_only_the_layer_in_use_moves_and_on_chip_memory_is_free(name, pieces, scalars):
    piece = 2 * 64 * 64
    assert work(STACK, name).hbm_bytes == pieces * piece + 4 * scalars


def test_other_backends_have_no_memory_on_the_chip():
    assert work(STACK, "twice", on_chip=False).hbm_bytes == 3 * 2 * 64 * 64


KERNELS = """ENTRY %main (q: bf16[4,8], m: bf16[8,8]) -> bf16[4,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  %m = bf16[8,8]{1,0} parameter(1)
  %flash = bf16[4,8]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"transcendentals":"7","flops":"640","bytes_accessed":"9"},"body":"x"}}
  %gemm = bf16[4,8]{1,0} custom-call(%q, %m), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %mystery = bf16[4,8]{1,0} custom-call(%q), custom_call_target="mystery"
  ROOT %buffer = bf16[4,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
}
"""  # noqa: E501


def test_kernels_cost_what_they_state_and_those_that_do_not_are_named():
    assert [work(KERNELS, name).flops for name in ("flash", "gemm", "mystery", "buffer")] == [640, 2 * 4 * 8 * 8, 0, 0]
    assert [work(KERNELS, name).hbm_bytes for name in ("flash", "mystery", "buffer")] == [9, 2 * 2 * 4 * 8, 0]
    assert kernels_without_cost(parse_hlo("HloModule test\n\n" + KERNELS)) == ["mystery"]


TRITON = """ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %other = f32[8,16]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "thrice"}
  ROOT %y = f32[8,16]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "twice"}
}
"""


def test_gpu_kernels_cost_what_the_traced_program_states():
    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    shape = jax.ShapeDtypeStruct((8, 16), "float32")
    cost = pl.CostEstimate(flops=77, transcendentals=0, bytes_accessed=88)
    call = pl.pallas_call(kernel, out_shape=shape, cost_estimate=cost, name="twice", interpret=True)
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: call(x), x))
    module = state_kernel_costs(parse_hlo("HloModule test\n\n" + TRITON), looped.trace(shape).jaxpr)
    entry = module.computations[module.entry]
    assert work_of(module, entry, entry.root, on_chip=False) == Work(flops=77, hbm_bytes=88)
    assert work_of(module, entry, entry.instructions["other"], on_chip=False) == Work(hbm_bytes=2 * 4 * 8 * 16)
    assert kernels_without_cost(module) == ["__gpu$xla.gpu.triton"]
