"""Eight CPU devices for every test, set before anything imports JAX; tests/gpu asks for the GPU instead."""

import collections
import os

import pytest

if "EPMOE_TEST_GPU" not in os.environ:
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"


# Of these tests `make test` runs every n-th case, `make test-slow` all.
EVERY_NTH = {
    "kernels/test_grouped_gemm.py::TestXla::test_gradients_equal_the_dense_definition": 4,
    "kernels/test_hopper.py::test_chosen_tilings_lower_for_cuda_and_fit_shared_memory": 2,
    "kernels/test_hopper.py::test_it_computes_the_definition_without_races": 3,
    "kernels/test_hopper_fp8.py::test_it_computes_the_definition": 2,
    "kernels/test_hopper_fp8.py::test_real_sizes_fit_shared_memory_and_lower_for_cuda": 3,
    "kernels/test_hopper_fp8.py::test_the_output_is_quantised_from_its_float32_values": 3,
    "kernels/test_hopper_outer.py::test_it_computes_the_definition_without_races": 3,
    "kernels/test_route_hopper.py::test_it_chooses_as_the_layer_does": 3,
    "kernels/test_schedule.py::test_all_rows_at_one_expert": 5,
    "kernels/test_schedule.py::test_no_rows_make_no_tiles": 3,
    "kernels/test_schedule.py::test_rows_past_the_groups_have_no_tile": 3,
    "kernels/test_schedule.py::test_the_candidate_that_finishes_first_depends_on_a_tiles_fixed_cost": 3,
    "kernels/test_triton.py::TestFloat8::test_it_computes_the_definition_whatever_the_scales": 5,
    "bench/test_bench_moe_layer.py::test_ranks_add_up_to_the_layer_and_run_as_it_runs": 3,
    "generate/test_generate_cli.py::test_a_converted_checkpoint_says_on_a_mesh_what_transformers_says": 3,
    "models/test_attention.py::test_mla_is_its_formula_on_every_mesh_expanded_and_absorbed": 2,
    "models/test_collectives.py::test_a_layer_has_two_all_reduces_and_no_other_collective": 2,
    "models/test_decoder.py::test_every_mesh_computes_the_same_logits_and_load": 2,
    "models/test_decoder.py::test_padding_changes_no_bit_of_real_tokens_and_takes_no_experts": 2,
    "models/test_decoder.py::test_positions_past_the_cache_are_dropped": 2,
    "models/test_dp_attention.py::test_a_ragged_batch_with_a_cache_gives_the_logits_of_the_whole_sequences": 3,
    "models/test_dp_attention.py::test_logits_and_load_are_those_of_one_device": 5,
    "moe/test_layer.py::test_any_mesh_and_axis_names_do_without_set_mesh": 3,
    "moe/test_layer.py::test_half_precision_stays_half_precision_and_close": 2,
    "moe/test_layer.py::test_runs_without_jit": 2,
    "moe/test_layer.py::test_takes_x_however_it_is_sharded": 3,
    "moe/test_layer.py::test_outputs_and_gradients_equal_the_dense_definition": 3,
    "moe/test_layer.py::test_the_compiled_program_has_one_all_reduce_and_no_other_collective": 3,
    "moe/test_quantized_layer.py::test_the_output_is_near_float32_over_the_same_weights": 3,
    "weights_convert/test_quantized.py::test_each_layout_is_near_float32_over_its_dequantised_weights_on_every_mesh": 3,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    seen: collections.Counter[str] = collections.Counter()
    for item in items:
        name = item.nodeid.partition("[")[0].partition("tests/")[2]
        if name in EVERY_NTH and not item.get_closest_marker("slow"):
            if seen[name] % EVERY_NTH[name]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1
