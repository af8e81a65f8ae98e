"""Tests of lookup_vit/analysis/hlo.py: texts as XLA writes them."""

import math

import pytest

from lookup_vit.analysis import hlo

# A scan of three steps as TPUs print it, with a gradient's reduction in it; a
# gather that is cut into two parts; reduce-scatters as TPUs do it, which share
# their number with each other, and with the reduction.
PROGRAM = """\
HloModule jit_update, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%cond (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %g = f32[4]{0:T(128)} get-tuple-element(%p), index=1
  %r = (f32[4]{0:T(128)S(1)}, /*index=1*/bf16[2,8]{1,0:T(8,128)(2,1)}) \
all-reduce(%g, %h), channel_id=1, replica_groups=mesh['a'=4,'b'=4] {'a','b'}, \
to_apply=%add, metadata={op_name="jit(update)/while/body/dot"}
  ROOT %t = (s32[], f32[4]) tuple(%i, %g)
}

%part.1 (p: bf16[2,8]) -> bf16[8,8] {
  %p.1 = bf16[2,8]{1,0} parameter(0)
  ROOT %ag.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=2, \
replica_groups=[4,4]<=[16], dimensions={0}
}

%part.2 (p: bf16[2,8]) -> bf16[8,8] {
  %p.2 = bf16[2,8]{1,0} parameter(0)
  ROOT %ag.2 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=2, \
replica_groups=[4,4]<=[16], dimensions={0}
}

%all-reduce-scatter (input: f32[32,10]) -> f32[8,10] {
  %input = f32[32,10]{1,0} parameter(0)
  %ar = f32[32,10]{1,0} all-reduce(%input), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %ds = f32[8,10]{1,0} dynamic-slice(%ar, %k, %z)
}

%all-reduce-scatter.1.clone (input.1: f32[32,10]) -> f32[8,10] {
  %input.1 = f32[32,10]{1,0} parameter(0)
  %ar.1 = f32[32,10]{1,0} all-reduce(%input.1), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %ds.1 = f32[8,10]{1,0} dynamic-slice(%ar.1, %k, %z)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %loop = (s32[], f32[4]) while(%init), condition=%cond, body=%body
  %known = (s32[], f32[4]) while(%init), condition=%other, body=%body.2, \
backend_config={"known_trip_count":{"n":"5"}}
  %f.1 = bf16[8,8]{1,0} fusion(%a), kind=kOutput, calls=%part.1
  %f.2 = bf16[8,8]{1,0} fusion(%a), kind=kOutput, calls=%part.2
  %f.3 = f32[8,10]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %f.4 = f32[8,10]{1,0} fusion(%a), kind=kCustom, \
calls=%all-reduce-scatter.1.clone
  %one = f32[4]{0} all-reduce(%a), channel_id=9, replica_groups={{0},{1}}
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1
}

%body.2 (q: (s32[], f32[4])) -> (s32[], f32[4]) {
  %q = (s32[], f32[4]) parameter(0)
  ROOT %cp = f32[4]{0} collective-permute(%q), channel_id=4, \
source_target_pairs={{0,1},{1,0}}
}
""".replace("\\\n", "")


def test_collectives():
  found = hlo.collectives(PROGRAM)
  want = {
    # 16 + 32 bytes among 16 devices, three times.
    "all-reduce": (3, 3 * 48, 3 * 48 * 2 * 15 / 16),
    "all-gather": (1, 128, 128 * 3 / 4),
    "reduce-scatter": (2, 2 * 1280, 2 * 1280 * 3 / 4),
    "collective-permute": (5, 5 * 16, 5 * 16),
  }
  got = {k: (c.count, c.bytes, c.sent) for k, c in found.items()}
  assert got == want


@pytest.mark.parametrize(
  "shape, size",
  [
    ("f32[2,3]{1,0:T(8,128)}", 24),
    ("(bf16[5], pred[7]{0}, /*index=2*/s8[])", 18),
    ("c64[3]", 24),
    ("f8e4m3fn[4]", 4),
    ("s4[4]", 2),
    ("token[]", 0),
  ],
)
def test_shape_bytes(shape, size):
  assert hlo.shape_bytes(shape) == size


ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}:
 value: <41 a @0> (size=4096,offset=0): f32[1024]{0}
allocation 9: size 5000, preallocated-temp:
 value: <43 f.1 @0> (size=2048,offset=1024): bf16[8,8]{1,0:T(8,128)(2,1)}
 value: <44 r{1} @0> (size=1024,offset=0): bf16[2,8]{1,0}
 value: <45 f.2 @0> (size=1024,offset=1024): bf16[8,8]{1,0}
 value: <46 ag.1 @0> (size=512,offset=4096): bf16[8,8]{1,0}
allocation 10: size 70000, color 1, preallocated-temp:
 value: <47 f.3 @0> (size=70000,offset=0): f32[8,10]{1,0}
"""


def test_temporaries_are_named_and_lie_apart():
  largest = hlo.temporaries(ASSIGNMENT, PROGRAM, 5)
  assert largest == [
    (2048, "bf16[8,8] f.1"),
    (1024, "bf16[2,8] dot"),
    (512, "bf16[8,8] ag.1"),
  ]
  assert hlo.temporaries(ASSIGNMENT, PROGRAM, 1) == largest[:1]
  assert hlo.temporaries("", PROGRAM, 5) == []


def test_refusals():
  needed, largest = hlo.required_memory(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    "for HLO temporaries (16.50G) exceeds available HBM (15.75G)."
  )
  assert needed == 16.5 * 2**30 and largest == []
  needed, largest = hlo.required_memory(
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used 20.25G of 15.75G hbm. Exceeded hbm capacity by "
    "4.5G.\n\n  Largest program allocations in hbm:\n\n  1. Size: 1.5G\n     "
    'Operator: op_name="jit(update)/transpose(jvp(ViT))/while/body/mlp/dot"\n'
    "     Shape: bf16[12,16,196,3072]{3,2,1,0:T(8,128)(2,1)}\n"
    "     Unpadded size: 1.4G\n"
  )
  assert needed == 20.25 * 2**30
  assert largest == [
    (1.5 * 2**30, "bf16[12,16,196,3072] backward of ViT/mlp/dot")
  ]
  assert hlo.required_memory("RESOURCE_EXHAUSTED: too much")[0] == math.inf
  with pytest.raises(ValueError, match="compiler failed: INTERNAL: no"):
    hlo.required_memory("INTERNAL: no\nstack")


MEMORIES = """HloModule step

%fused (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %n = bf16[8,16]{1,0} negate(%p)
}

ENTRY %main (a: bf16[8,16], w: f32[64,16]) -> (bf16[8,16]) {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[64,16]{1,0:T(8,128)} parameter(1)
  %s = ((f32[64,16]{1,0:T(8,128)}), f32[4,16]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:4], [0:16]}
  %d = f32[4,16]{1,0:T(8,128)S(1)} slice-done(%s)
  %f = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} fusion(%a), kind=kLoop, calls=%fused
  %g = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} fusion(%f, %d), kind=kLoop, calls=%fused
  %k = (bf16[8,16]{1,0:T(8,128)(2,1)}, f32[1,16]{1,0:T(1,128)S(1)}) custom-call(%g, %a, %a), custom_call_target="tpu_custom_call"
  %e = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%k), index=0
  %c = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%e)
  %r = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} copy-done(%c)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} negate(%r)
  ROOT %t = (bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%x)
}
"""  # noqa: E501


def test_bytes_of_the_main_memory():
  array, part = 8 * 16 * 2, 4 * 16 * 4
  # The slice; %a by %f; by %k twice and the first result; what the copy reads;
  # what %x writes.
  want = part + array + 3 * array + array + array
  assert hlo.main_memory_bytes(MEMORIES) == want
