"""Collectives read from text. Oracles: texts written by hand, and a program on 8 devices whose traffic is known."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwenla_jax.planner.hlo import collectives, group_size, parse, trip_count, type_bytes

HERE = Path(__file__).resolve().parent

# A loop of 5 rounds in steps of 2 (0, 2, .. 8) with an all-gather, in which a loop that ends by what it computes holds
# an all-reduce; behind it a reduce-scatter as the TPU compiler writes it, and a permute.
TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[8,16]) -> bf16[2,16] {
  %input = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[8,16]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %slice = bf16[2,16]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={2,16}
}

%open_body (p: (f32[4,4], pred[])) -> (f32[4,4], pred[]) {
  %p = (f32[4,4]{1,0:T(8,128)}, pred[]{:T(512)}) parameter(0)
  %x = f32[4,4]{1,0:T(8,128)} get-tuple-element(%p), index=0
  %all-reduce.1 = f32[4,4]{1,0:T(8,128)} all-reduce(%x), channel_id=2, replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add, metadata={op_name="inner"}
  %more = pred[]{:T(512)} get-tuple-element(%p), index=1
  ROOT %t = (f32[4,4]{1,0:T(8,128)}, pred[]{:T(512)}) tuple(%all-reduce.1, %more)
}

%open_condition (q: (f32[4,4], pred[])) -> pred[] {
  %q = (f32[4,4]{1,0:T(8,128)}, pred[]{:T(512)}) parameter(0)
  ROOT %go = pred[]{:T(512)} get-tuple-element(%q), index=1
}

%body (r: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %r = (s32[]{:T(128)}, f32[4,4]{1,0:T(8,128)}) parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %i = s32[]{:T(128)} get-tuple-element(%r), index=0
  %y = f32[4,4]{1,0:T(8,128)} get-tuple-element(%r), index=1
  %all-gather.1 = f32[32,4]{1,0:T(8,128)} all-gather(%y), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %yes = pred[]{:T(512)} constant(true)
  %inner = (f32[4,4]{1,0:T(8,128)}, /*index=1*/pred[]{:T(512)}) tuple(%y, %yes)
  %loop.2 = (f32[4,4]{1,0:T(8,128)}, pred[]{:T(512)}) while(%inner), condition=%open_condition, body=%open_body
  %z = f32[4,4]{1,0:T(8,128)} get-tuple-element(%loop.2), index=0
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %u = (s32[]{:T(128)}, f32[4,4]{1,0:T(8,128)}) tuple(%next, %z)
}

%condition (s: (s32[], f32[4,4])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[4,4]{1,0:T(8,128)}) parameter(0)
  %nine = s32[]{:T(128)} constant(9)
  %j = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %nine), direction=LT
}

ENTRY %main (x: f32[4,4], g: bf16[8,16]) -> f32[4,4] {
  %x.1 = f32[4,4]{1,0:T(8,128)} parameter(0)
  %g = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[4,4]{1,0:T(8,128)}) tuple(%zero, %x.1)
  %loop.1 = (s32[]{:T(128)}, f32[4,4]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %scattered = bf16[2,16]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %passed.1 = (f32[4,4]{1,0:T(8,128)}, f32[4,4]{1,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x.1), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %passed.2 = f32[4,4]{1,0:T(8,128)} collective-permute-done(%passed.1)
  ROOT %out = f32[4,4]{1,0:T(8,128)} get-tuple-element(%loop.1), index=1
}
"""  # noqa: E501


def test_collectives_of_a_text_by_hand():
    result = {one.kind: one for one in collectives(TEXT, 8, [7])}
    # Gathered: 32 x 4 numbers of 4 bytes; each of 8 chips sends its share 7 times on; 5 rounds.
    gather = result["all-gather"]
    assert (gather.payload, gather.group, gather.times, gather.sent) == (512, 8, 5, 512 * 7 / 8 * 5)
    # 16 numbers reduced over 2 chips, 5 times 7 rounds; a ring sends all but a share twice.
    reduce = result["all-reduce"]
    assert (reduce.payload, reduce.group, reduce.times, reduce.sent, reduce.where) == (64, 2, 35, 64 * 35, "inner")
    scatter = result["reduce-scatter"]
    assert (scatter.payload, scatter.group, scatter.times, scatter.sent) == (256, 4, 1, 192)
    passed = result["collective-permute"]
    assert (passed.payload, passed.times, passed.sent) == (64, 1, 64)
    assert len(result) == len(collectives(TEXT, 8)) == 4


def test_work_between_start_and_end_overlaps_what_is_sent():
    end = "  %passed.2 ="
    work = "  %work = f32[4,4]{1,0} fusion(%x.1), kind=kLoop, calls=%add\n"
    reshaped = "  %other = f32[16]{0} bitcast(%x.1)\n"
    for between, overlapped in (("", False), (reshaped, False), (work, True), (reshaped + work, True)):
        found = collectives(TEXT.replace(end, between + end), 8)
        assert {one.kind for one in found if one.overlapped} == ({"collective-permute"} if overlapped else set())
    late = TEXT.replace("  ROOT %out", work + "  ROOT %out")  # behind the end
    assert not any(one.overlapped for one in collectives(late, 8))


def test_loops_over_pages_take_no_rounds():
    """Of the loop within, if it is over pages, the one around it is that of the list."""
    nested = TEXT.replace("%nine = s32[]{:T(128)} constant(9)", "%nine = s32[]{:T(128)} custom-call()")
    pages = nested.replace("body=%open_body", 'body=%open_body, metadata={op_name="a/own_pages/while"}')
    times = {one.kind: one.times for one in collectives(pages, 8, [7])}
    assert times["all-gather"] == times["all-reduce"] == 7


def test_a_loop_beyond_the_list_runs_once_and_of_nested_ones_the_innermost_counts():
    assert next(one for one in collectives(TEXT, 8) if one.kind == "all-reduce").times == 5
    nested = TEXT.replace("%nine = s32[]{:T(128)} constant(9)", "%nine = s32[]{:T(128)} custom-call()")
    times = {one.kind: one.times for one in collectives(nested, 8, [7])}
    assert times["all-reduce"] == 7 and times["all-gather"] == 1


@pytest.mark.parametrize(
    ("old", "new", "rounds"),
    [
        ("constant(9)", "constant(10)", 5),
        ("constant(2)", "constant(1)", 9),
        ("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} constant(3)", 3),
        ("compare(%j, %nine), direction=LT", "compare(%nine, %j), direction=GT", 5),
        ("compare(%j, %nine), direction=LT", "compare(%j, %nine), direction=NE", None),
        ("condition=%condition, body=%body", 'condition=%c, body=%b, backend_config={"known_trip_count":{"n":"6"}}', 6),
    ],
)
def test_rounds_come_from_the_text(old, new, rounds):
    entry, computations = parse(TEXT.replace(old, new))
    loop = next(one for one in computations[entry] if one.opcode == "while")
    assert trip_count(loop, entry, computations) == rounds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[8,4]{1,0:T(8,128)}", 128),
        ("bf16[3]", 6),
        ("pred[]", 1),
        ("(s32[], /*index=1*/u8[10]{0}, f8e4m3fn[4])", 18),
        ("s4[8]", 4),
    ],
)
def test_bytes_of_a_type(text, size):
    assert type_bytes(text) == size


@pytest.mark.parametrize(
    ("attribute", "size"),
    [
        ("replica_groups=[2,8]<=[8,2]T(1,0)", 8),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", 8),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=3] {'a','c'}", 12),
        ("replica_groups=mesh['a'=1,'b'=16,'c'=4], device_ids=([16,4]T(1,0)) {'b'}", 16),
        ("channel_id=1", 16),
        ("replica_groups={}", 16),
    ],
)
def test_chips_of_a_group(attribute, size):
    assert group_size(f"%x), {attribute}, dimensions={{0}}", 16) == size


def test_groups_in_an_unknown_way_are_refused():
    with pytest.raises(ValueError, match="replica_groups=ring"):
        group_size("%x), replica_groups=ring['a'=1]{'a'}, dimensions={0}", 16)


@pytest.mark.parametrize(
    ("instruction", "kind", "payload"),
    [
        ("f32[2,4]{1,0} reduce-scatter(%x), ", "reduce-scatter", 256),
        ("(f32[4]{0}, f32[32]{0}) all-gather-start(%x), ", "all-gather", 128),
        ("(f32[8]{0}, bf16[8,1]{1,0}) all-reduce(%x, %y), ", "all-reduce", 48),
        ("f32[8,4]{1,0} all-to-all(%x), ", "all-to-all", 128),
    ],
)
def test_bytes_of_a_kind(instruction, kind, payload):
    text = f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  ROOT %c = {instruction}replica_groups=[1,8]<=[8]\n}}\n"
    assert [(one.kind, one.payload, one.group) for one in collectives(text, 8)] == [(kind, payload, 8)]


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("module @jit_f {}")


def test_a_program_on_eight_devices():
    """Compiled by XLA for 8 devices of a CPU, in an own process."""
    result = subprocess.run(
        [sys.executable, str(HERE / "eight_devices.py")], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "as known" in result.stdout
