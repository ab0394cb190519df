"""How a profile's time is divided over named scopes: on events and a program made up, and on a profile that the CPU records."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from bench import scopes
from bench.scopes import Event

HLO = """\
HloModule jit_layer, is_scheduled=true

%fused_computation (param_0: f32[4]) -> bf16[4] {
  %param_0 = f32[4]{0} parameter(0)
  %multiply.1 = f32[4]{0} multiply(%param_0, %param_0), metadata={op_name="jit(layer)/while/body/combine/mul" stack_frame_id=3}
  ROOT %convert.1 = bf16[4]{0} convert(%multiply.1), metadata={op_name="jit(layer)/convert_element_type"}
}

%body (arg: (s32[], f32[4])) -> (s32[], f32[4]) {
  %custom-call.2 = f32[4]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(layer)/while/body/gate_up/jit(_run)/pallas_call"}
  ROOT %tuple = (s32[], f32[4]) tuple(%i, %custom-call.2)
}

ENTRY %main.7 (x.1: f32[4]) -> bf16[4] {
  %x.1 = f32[4]{0} parameter(0), metadata={op_name="x"}
  %psum.5 = f32[4]{0} all-reduce(%x.1), to_apply=%add, metadata={op_name="jit(layer)/gate_up/psum"}
  %while.3 = (s32[], f32[4]) while(%tuple.2), condition=%cond, body=%body, metadata={op_name="jit(layer)/while"}
  ROOT %loop_convert_fusion = bf16[4]{0} fusion(%gte), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(layer)/convert_element_type"}
}
"""
NAMES = ("gate_up", "combine")


def test_an_instruction_has_the_scope_that_it_was_written_in_or_that_of_what_it_fuses():
    found = scopes.scopes(HLO, NAMES)
    assert found == {
        "multiply.1": "combine",
        "custom-call.2": "gate_up",
        "loop_convert_fusion": "combine",
        "psum.5": "gate_up",
    }


def test_what_runs_inside_a_loops_event_counts_once():
    host = [
        Event("while.3", 0, 10_000),
        Event("custom-call.2", 1_000, 3_000),
        Event("custom-call.2", 5_000, 4_000),
        Event("loop_convert_fusion", 10_000, 2_000),
    ]
    stream = [Event("custom-call.2", 0, 1_500)]
    total = scopes.divide([host, stream])
    assert total == pytest.approx({"custom-call.2": 8.5, "loop_convert_fusion": 2.0, "while.3": 3.0})


def test_a_kernel_that_begins_while_another_ends_is_not_inside_it():
    total = scopes.divide([[Event("a", 0, 30_000), Event("b", 29_000, 3_000), Event("c", 32_000, 2_000)]])
    assert total == pytest.approx({"a": 29.0, "b": 3.0, "c": 2.0})


def layer(x):
    with jax.named_scope("router"):
        y = jnp.sort(x, axis=0)

    def body(_, carry):
        with jax.named_scope("gate_up"):
            return jnp.tanh(carry @ x)

    y = jax.lax.fori_loop(0, jnp.int32(y[0, 0] * 0 + 3), body, y)
    return y + 1


def test_a_recorded_profile_is_divided_over_the_scopes():
    x = jnp.ones((256, 256))
    lowered = jax.jit(layer).lower(x)
    programs = lowered.compile(), lowered.compile(scopes.ONE_BY_ONE)
    calls = (partial(program, x) for program in programs)
    measured = scopes.measure(*calls, programs[1].as_text(), 3, ("router", "gate_up", "down"))
    assert set(measured["parts"]) == {"router", "gate_up", "other"}
    assert all(us > 0 for us in measured["parts"].values())
    assert measured["device_us"] == pytest.approx(sum(measured["parts"].values()))
    assert {kernel["scope"] for kernel in measured["kernels"]} == {"router", "gate_up", "other"}
    assert measured["stream_us"] > 0


def test_without_a_profile_the_whole_is_told_alone(monkeypatch, capsys):
    monkeypatch.setattr(scopes, "device_lines", lambda profile: [[]])
    x = jnp.ones((8, 8))
    call = partial(jax.jit(layer).lower(x).compile(), x)
    measured = scopes.measure(call, call, "", 2, NAMES)
    assert measured["parts"] == {}
    assert measured["device_us"] == measured["stream_us"]
    assert "no kernel times: RuntimeError: the profile has no event" in capsys.readouterr().out


def test_of_a_gpus_profile_only_the_streams_count_and_each_gpu_is_by_itself():
    class Line:
        def __init__(self, name, *ops):
            self.name = name
            self.events = [_event(op) for op in ops]

    class Plane:
        def __init__(self, name, *lines):
            self.name, self.lines = name, lines

    class Profile:
        planes = (
            Plane("/host:CPU", Line("python", "custom-call.2")),
            Plane(
                "/device:GPU:0", Line("Stream #13(Compute)", "custom-call.2", None), Line("XLA Ops", "custom-call.2")
            ),
            Plane("/device:GPU:1", Line("Stream #13(Compute)", "all-reduce-start.1"), Line("Stream #20(Compute)")),
        )

    first, second = [Event("custom-call.2", 0, 5)], [Event("all-reduce-start.1", 0, 5)]
    assert scopes.device_lines(Profile) == [[first], [second, []]]


COLLECTIVES = """\
%async_computation (param: bf16[8,16]) -> bf16[2,16] {
  ROOT %reduce_scatter.2 = bf16[2,16]{1,0} reduce-scatter(%param), channel_id=5, dimensions={0}, to_apply=%add
}

%async_computation.1 (param.1: f32[8]) -> f32[8] {
  ROOT %fusion.1 = f32[8]{0} fusion(%param.1), kind=kLoop, calls=%fused_computation
}

%all_reduce_computation (param.2: bf16[4,16]) -> bf16[4,16] {
  ROOT %all-reduce.8 = bf16[4,16]{1,0} all-reduce(%param.2), channel_id=6, to_apply=%add
}

ENTRY %main (x: bf16[8,16]) -> f8e4m3fn[8,16] {
  %psum.3 = bf16[8,16]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %all-reduce-start = (f32[8]{0}, bf16[2,3]{1,0}) all-reduce-start(%a, %b), channel_id=2, to_apply=%add
  %all-reduce-start.1 = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%a), channel_id=2, to_apply=%add
  %all-reduce-done = (f32[8]{0}, bf16[2,3]{1,0}) all-reduce-done(%all-reduce-start)
  %all-gather-start.1 = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%y), channel_id=3, dimensions={0}
  ROOT %all-gather.9 = f8e4m3fn[8,16]{1,0} all-gather(%y), channel_id=3, dimensions={0}
  %reduce-scatter.5 = f32[2,16]{1,0} reduce-scatter(%z), channel_id=4, dimensions={0}, to_apply=%add
  %reduce-scatter-start = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}, u32[]) async-start(%z), calls=%async_computation
  %fusion.3 = bf16[4,16]{1,0} fusion(%z), kind=kCustom, calls=%all_reduce_computation
  %fusion.4 = bf16[4,16]{1,0} fusion(%z), kind=kLoop, calls=%fused_computation
  %gather.7 = bf16[8,16]{1,0} gather(%x, %i)
  %fusion-start = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%z), calls=%async_computation.1
}
"""


def test_collectives_are_found_with_the_bytes_of_the_whole_array():
    found = scopes.collectives(COLLECTIVES, 4)
    assert found == {
        "psum.3": ("all-reduce", 256),
        "all-reduce-start": ("all-reduce", 32 + 12),
        "all-reduce-start.1": ("all-reduce", 32),
        "all-gather-start.1": ("all-gather", 256),
        "all-gather.9": ("all-gather", 128),
        "reduce-scatter.5": ("reduce-scatter", 4 * 128),
        "reduce-scatter-start": ("reduce-scatter", 256),
        "fusion.3": ("all-reduce", 128),
    }
    assert found["psum.3"].sent(4) == 2 * 256 * 3 / 4
    assert found["all-gather.9"].sent(4) == 128 * 3 / 4


def test_collectives_are_named_by_their_order_in_the_program(capsys):
    """As seen: what was split has its name from before, the others have their own; small ones have kernels of XLA's."""
    hlo = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %all-reduce-start = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x), channel_id=1, to_apply=%add
  %all-reduce-done = f32[8]{0} all-reduce-done(%all-reduce-start)
  %fusion.1 = f32[8]{0} fusion(%all-reduce-done), kind=kLoop, calls=%fused_computation
  ROOT %psum.2 = f32[8]{0} all-reduce(%fusion.1), channel_id=2, to_apply=%add
}
"""
    names = list(scopes.collectives(hlo, 2))
    assert names == ["all-reduce-start", "psum.2"]

    def two_calls(is_nccl):
        return [
            [Event("psum.1", 0, 2, is_nccl), Event("psum.1", 20, 2, is_nccl)],
            [Event("fusion.1", 2, 5), Event("psum.2", 8, 2, is_nccl), Event("psum.2", 28, 2, is_nccl)],
        ]

    for is_nccl in (True, False):
        named = scopes.name_collectives(two_calls(is_nccl), hlo, names, 2)
        assert [[event.op for event in line] for line in named] == [
            ["all-reduce-start"] * 2,
            ["fusion.1", "psum.2", "psum.2"],
        ]
    assert scopes.name_collectives(two_calls(True), hlo, names, 3) == two_calls(True)
    assert "4 kernels of NCCL's in 3 calls of 2 collectives" in capsys.readouterr().out


def test_a_collectives_time_is_the_last_comers_and_the_rest_is_waiting():
    first = [[Event("all-reduce.3", 0, 5_000), Event("all-reduce.3", 20_000, 3_000)], [Event("fusion", 0, 1_000)]]
    second = [[Event("all-reduce.3", 21_000, 4_000), Event("all-reduce.3", 2_000, 3_000)]]
    assert scopes.collective_us([first, second], {"all-reduce.3"}) == {"all-reduce.3": (3.0 + 3.0, 1.0 + 0.5)}


def _event(op):
    stats = [("hlo_module", "jit_layer"), *([("hlo_op", op)] if op else [])]
    return type("E", (), {"name": "kernel", "start_ns": 0, "duration_ns": 5, "stats": stats})
