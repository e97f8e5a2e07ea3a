"""Bytes moved, read from programs' texts. Oracles: the compiler's count where there are no loops, and hand numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from fit_options import LARGE
from programs import abstract, compiled, needs_tpu_compiler

from qwenla_jax.config.shared_options import MeshOptions
from qwenla_jax.model.kernels import planned_for
from qwenla_jax.parallel.mesh import make_mesh
from qwenla_jax.planner.arithmetic import least_token_bytes, sizes_of
from qwenla_jax.planner.chips import parse_topology, tpu_devices
from qwenla_jax.planner.compiled import Load, abstract_runtime, plan_programs
from qwenla_jax.planner.hbm_traffic import memory_traffic, token_bytes
from qwenla_jax.planner.published import published_config

INDEX = abstract(dtype=jnp.int32)
PROGRAMS = {
    "product": (lambda x, w: jnp.tanh(x @ w), abstract(64, 128), abstract(128, 32)),
    "slice": (lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, 1, 0) * 2.0 + 1, abstract(28, 64, 64), INDEX),
    "layer": (lambda x, w, i: x @ w[i], abstract(16, 64), abstract(28, 64, 64), INDEX),
    "sum": (lambda x: jnp.exp(x).sum(1), abstract(64, 256)),
    "update": (
        lambda x, y, i: jax.lax.dynamic_update_slice_in_dim(x, y * 2, i, 0),
        abstract(28, 64),
        abstract(1, 64),
        INDEX,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_loops_it_is_the_compilers_count(name):
    program = compiled(*PROGRAMS[name])
    counted = sum(one.bytes for one in memory_traffic(program.as_text()))
    assert counted == program.cost_analysis()["bytes accessed"]


def test_a_layer_is_counted_as_often_as_it_runs():
    """28 products of [16, 64] with [64, 64]: the compiler counts one."""

    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    program = compiled(run, abstract(16, 64), abstract(28, 64, 64))
    moved = memory_traffic(program.as_text())
    inside = [one for one in moved if one.times == 28]
    assert {one.times for one in moved} == {1, 28}
    product = 4 * (2 * 16 * 64 + 64 * 64)
    assert 28 * product <= sum(one.bytes for one in inside) < 28 * 4 * product
    assert sum(one.bytes for one in moved) > 10 * program.cost_analysis()["bytes accessed"]


# Of the TPU compiler, shortened: weights of 64 bytes come into the chip's own memory in four slices, under way beside
# other work, and a product reads them there. All that is moved: the weights once, x and the result; room is no move.
_OWN = "{0:T(1024)(128)(4,1)S(1)}"
SLICES = "\n".join(
    [
        "HloModule jit_run, is_scheduled=true",
        "%fused (p.1: f32[4], p.2: s8[64]) -> f32[4] {",
        "  %p.1 = f32[4]{0:T(128)} parameter(0)",
        f"  %p.2 = s8[64]{_OWN} parameter(1)",
        "  ROOT %product.1 = f32[4]{0:T(128)} custom-call(%p.1, %p.2)",
        "}",
        "ENTRY %main.1 (x.1: f32[4], w.1: s8[64]) -> f32[4] {",
        "  %x.1 = f32[4]{0:T(128)} parameter(0)",
        "  %w.1 = s8[64]{0:T(1024)(128)(4,1)} parameter(1)",
        '  %room = f32[512]{0:T(128)} custom-call(), custom_call_target="AllocateBuffer"',
        *(
            f"  %slice-start.{n} = ((s8[64]{{0:T(1024)(128)(4,1)}}), s8[16]{_OWN}, s32[]{{:S(2)}}) slice-start(%w.1), "
            f"slice={{[{16 * n}:{16 * n + 16}]}}"
            for n in range(4)
        ),
        *(f"  %slice-done.{n} = s8[16]{_OWN} slice-done(%slice-start.{n})" for n in range(4)),
        f"  %joined = s8[64]{_OWN} custom-call({', '.join(f'%slice-done.{n}' for n in range(4))}), "
        'custom_call_target="ConcatBitcast"',
        "  ROOT %product = f32[4]{0:T(128)} fusion(%x.1, %joined), kind=kOutput, calls=%fused",
        "}",
    ]
)


def test_slices_under_way_are_the_array_once():
    moved = memory_traffic(SLICES)
    assert sum(one.read for one in moved) == 64 + 4 * 4
    assert sum(one.written for one in moved) == 4 * 4


# A sampler: a loop over tokens with 2 layers, in each a product by 512 bytes of weights, and a loop over pages of 64
# bytes, which a fusion slices out of 256. What is placed in the chip's own memory, S(1), is not moved.
SAMPLER = """HloModule jit_run, is_scheduled=true

%sliced (a: f32[2,2,16], b: s32[]) -> f32[16] {
  %a = f32[2,2,16]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero = s32[] constant(0)
  %page = f32[1,1,16]{2,1,0} dynamic-slice(%a, %b, %b, %zero), dynamic_slice_sizes={1,1,16}
  ROOT %flat = f32[16]{0} bitcast(%page)
}

%page_body (p: (s32[], f32[2,2,16], f32[16])) -> (s32[], f32[2,2,16], f32[16]) {
  %p = (s32[], f32[2,2,16]{2,1,0}, f32[16]{0:S(1)}) parameter(0)
  %f = s32[] get-tuple-element(%p), index=0
  %k = f32[2,2,16]{2,1,0} get-tuple-element(%p), index=1
  %read = f32[16]{0:S(1)} fusion(%k, %f), kind=kLoop, calls=%sliced
  ROOT %q = (s32[], f32[2,2,16]{2,1,0}, f32[16]{0:S(1)}) tuple(%f, %k, %read)
}

%open (c: (s32[], f32[2,2,16], f32[16])) -> pred[] {
  %c = (s32[], f32[2,2,16]{2,1,0}, f32[16]{0:S(1)}) parameter(0)
  ROOT %go = pred[] custom-call(), custom_call_target="more"
}

%layer (l: (s32[], f32[2,2,16], f32[16])) -> (s32[], f32[2,2,16], f32[16]) {
  %l = (s32[], f32[2,2,16]{2,1,0}, f32[16]{0:S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%l), index=0
  %x = f32[16]{0:S(1)} get-tuple-element(%l), index=2
  %w = f32[128]{0} custom-call(), custom_call_target="weights"
  %out = f32[16]{0:S(1)} custom-call(%w, %x), custom_call_target="product"
  %pages = (s32[], f32[2,2,16]{2,1,0}, f32[16]{0:S(1)}) while(%l), condition=%open, body=%page_body, metadata={op_name="jit(run)/while/body/attn/own_pages/while"}
  ROOT %m = (s32[], f32[2,2,16]{2,1,0}, f32[16]{0:S(1)}) tuple(%i, %l, %out)
}

%token (t: (s32[], f32[2,2,16], f32[16])) -> (s32[], f32[2,2,16], f32[16]) {
  %t = (s32[], f32[2,2,16]{2,1,0}, f32[16]{0:S(1)}) parameter(0)
  ROOT %layers = (s32[], f32[2,2,16]{2,1,0}, f32[16]{0:S(1)}) while(%t), condition=%open, body=%layer, backend_config={"known_trip_count":{"n":"2"}}
}

ENTRY %main (s: (s32[], f32[2,2,16], f32[16])) -> (s32[], f32[2,2,16], f32[16]) {
  %s = (s32[], f32[2,2,16]{2,1,0}, f32[16]{0:S(1)}) parameter(0)
  %start = f32[1000]{0} broadcast(%s), dimensions={}
  ROOT %loop = (s32[], f32[2,2,16]{2,1,0}, f32[16]{0:S(1)}) while(%s), condition=%open, body=%token, metadata={op_name="jit(run)/while"}
}
"""  # noqa: E501


def test_a_token_of_a_sampler_by_hand():
    moved = memory_traffic(SAMPLER)
    # In a layer 512 bytes of weights are written by what makes them and read by the product. A page is 64 bytes, and 4
    # for its number; of 5 pages 3 are filled on average.
    weights, page = 2 * 512, 64 + 4
    assert token_bytes(moved, 5, 1) == 2 * (weights + 3 * page)
    shared = memory_traffic(SAMPLER.replace("own_pages", "shared_pages"))
    assert token_bytes(shared, 5, 7) == 2 * (weights + 7 * page)
    in_memory = memory_traffic(SAMPLER.replace(":S(1)", ""))
    assert token_bytes(in_memory, 1, 1) == 2 * (weights + page + 3 * 64)  # the product reads and writes 64, the page 64
    with pytest.raises(ValueError, match="no loop over tokens"):
        token_bytes(moved[:1], 1, 1)


@pytest.mark.slow
@needs_tpu_compiler
def test_decoding_copies_neither_weights_nor_keys_on_a_tpu(tmp_path):
    """Compiled at full effort for a v5p: 4 of the 7B's layers, responses of up to 16,384 tokens.

    A copy of the layers' weights, or of the keys and values, would add a half or more to what a token has to move.
    """
    config = published_config("7b")
    decoder = dataclasses.replace(config.text, num_layers=4, vocab_size=16384)
    vision = dataclasses.replace(config.vision, depth=2, full_attention_layers=(1,))
    ids = dict(image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4)
    short = dataclasses.replace(config, text=decoder, vision=vision, **ids)
    (tmp_path / "config.json").write_text(json.dumps(short.to_hf()))
    data = dataclasses.replace(LARGE.data, batch_size=2, max_response_tokens=16384)
    options = dataclasses.replace(LARGE, init_from=f"random:{tmp_path}", data=data)
    mesh = make_mesh(MeshOptions(), devices=tpu_devices(parse_topology("v5p:2x2x1"))[:1])
    runtime, load = abstract_runtime(options, mesh), Load(512)
    with planned_for("tpu"):
        planned = plan_programs(runtime, load)
    text = planned.programs["rollout"].compile().as_text()
    moved = token_bytes(memory_traffic(text), *planned.pages)
    assert 1 < moved / least_token_bytes(runtime, sizes_of(runtime, load)) < 1.15
