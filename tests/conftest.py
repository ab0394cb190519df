"""Eight CPU devices for every test, set before anything imports JAX; tests/gpu asks for the GPU instead."""

import collections
import os

import pytest

if "EPMOE_TEST_GPU" not in os.environ:
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
else:  # trying ways to multiply takes longer than to run one of them once
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"


# Of these tests `make test` runs every n-th case (0: none) or the cases that are named, `make test-slow` all.
THINNED: dict[str, int | tuple[str, ...]] = {
    "bench/test_bench_decode_step.py::test_a_quantised_experts_bytes_are_those_of_its_values_and_scales": 0,
    "bench/test_bench_decode_step.py::test_every_call_is_the_same_and_ends_with_the_context": 0,
    "bench/test_bench_moe_layer.py::test_a_quantised_run_writes_right_numbers_and_its_format": 0,
    "bench/test_bench_moe_layer.py::test_a_run_writes_right_numbers_and_shows_them": 0,
    "bench/test_bench_moe_layer.py::test_a_second_run_adds_what_the_first_left_out": 0,
    "bench/test_bench_moe_layer.py::test_ranks_add_up_to_the_layer_and_run_as_it_runs": 3,
    "examples/test_demo_in_fp8.py::test_perplexity_is_within_one_percent": 0,
    "generate/test_generate_cli.py::test_a_converted_checkpoint_says_on_a_mesh_what_transformers_says": 3,
    "generate/test_llm.py::test_random_weights_need_only_a_config": 0,
    "generate/test_scoring.py::test_scores_are_those_of_whole_sequence_logits": 4,
    "kernels/test_decode_hopper.py::test_it_attends_as_the_definition": 2,
    "kernels/test_grouped_gemm.py::TestXla::test_gradients_equal_the_dense_definition": 8,
    "kernels/test_grouped_gemm.py::TestXla::test_gradients_where_out_dtype_is_wider": 2,
    "kernels/test_grouped_gemm.py::TestXla::test_odd_sizes": 3,
    "kernels/test_hopper.py::test_chosen_tilings_lower_for_cuda_and_fit_shared_memory": 5,
    "kernels/test_hopper.py::test_both_gradients_lower_for_cuda": 0,
    "kernels/test_hopper.py::test_it_computes_the_definition_without_races": (
        "a bias, k and n off the tile",
        "sizes around the tile",
    ),
    "kernels/test_hopper_fp8.py::test_a_gates_output_is_quantised_by_its_experts_scale_where_it_was_summed": 4,
    "kernels/test_hopper_fp8.py::test_a_gates_output_is_quantised_where_it_was_summed": 4,
    "kernels/test_hopper_fp8.py::test_it_computes_the_definition": (
        "blocks, k in parts",
        "large groups",
    ),
    "kernels/test_hopper_fp8.py::test_real_sizes_fit_shared_memory_and_lower_for_cuda": (
        "65536-128-768-2048-False-kinds9-None",
        "32768-4-7168-2048-True-kinds6-None",
        "6144-20-5120-1536-True-kinds11-tensor",
    ),
    "kernels/test_hopper_fp8.py::test_the_output_is_quantised_from_its_float32_values": 3,
    "kernels/test_hopper_outer.py::test_it_computes_the_definition_without_races": 5,
    "kernels/test_mla_hopper.py::test_it_is_a_softmax_over_each_sequences_own_positions": 2,
    "kernels/test_quantize_hopper.py::test_rows_are_quantised_bit_for_bit": 3,
    "kernels/test_quantize_hopper.py::test_rows_are_quantised_by_given_scales_and_their_largest_numbers_found": 3,
    "kernels/test_rope_hopper.py::test_it_does_what_attention_does": 2,
    "kernels/test_route_hopper.py::test_it_chooses_as_the_layer_does": 6,
    "kernels/test_rows.py::test_the_hopper_kernel_sums_as_the_definition": 3,
    "kernels/test_schedule.py::test_a_single_group_s_tiles_need_no_kernel": 3,
    "kernels/test_schedule.py::test_all_rows_at_one_expert": 20,
    "kernels/test_schedule.py::test_groups_are_cut_sorted_and_picked_as_by_hand": 8,
    "kernels/test_schedule.py::test_it_lowers_for_cuda": 3,
    "kernels/test_schedule.py::test_no_rows_make_no_tiles": 3,
    "kernels/test_schedule.py::test_rows_past_the_groups_have_no_tile": 3,
    "kernels/test_schedule.py::test_the_candidate_that_finishes_first_depends_on_a_tiles_fixed_cost": 3,
    "kernels/test_triton.py::TestFloat8::test_it_computes_the_definition_whatever_the_scales": 16,
    "kernels/test_triton.py::TestFloat8::test_the_output_is_quantised_from_its_float32_values": 4,
    "kernels/test_triton.py::TestTriton::test_equals_the_loop_over_groups": 3,
    "kernels/test_triton.py::TestTriton::test_gradients_equal_the_dense_definition": 3,
    "kernels/test_triton.py::TestTriton::test_the_same_bits_on_every_run": 3,
    "kernels/test_triton.py::test_every_tile_compiles_for_its_gpu_and_fits_it": 0,
    "kernels/test_triton.py::test_float8_is_multiplied_as_float8_where_tensor_cores_take_it": 0,
    "kernels/test_tuning.py::test_shared_memory_is_what_the_kernel_asks_for": 3,
    "models/test_attention.py::test_mla_is_its_formula_on_every_mesh_expanded_and_absorbed": 2,
    "models/test_attention.py::test_the_library_sees_what_the_definition_sees": 4,
    "models/test_collectives.py::test_a_decode_step_adds_one_all_reduce_to_embed_and_one_all_gather_of_logits": 3,
    "models/test_collectives.py::test_a_layer_has_two_all_reduces_and_no_other_collective": 6,
    "models/test_decoder.py::test_a_ragged_batch_in_pieces_is_each_sequence_alone": 3,
    "models/test_decoder.py::test_every_mesh_computes_the_same_logits_and_load": 2,
    "models/test_decoder.py::test_padding_changes_no_bit_of_real_tokens_and_takes_no_experts": 2,
    "models/test_decoder.py::test_positions_past_the_cache_are_dropped": 2,
    "models/test_dp_attention.py::test_a_layer_gathers_once_and_scatters_once": 3,
    "models/test_dp_attention.py::test_a_ragged_batch_with_a_cache_gives_the_logits_of_the_whole_sequences": 3,
    "models/test_dp_attention.py::test_gradients_are_those_of_one_device": 0,
    "models/test_dp_attention.py::test_logits_and_load_are_those_of_one_device": 10,
    "models/test_dp_attention.py::test_the_engine_says_the_same": 0,
    "models/test_kv_cache.py::test_a_first_chunk_reads_no_float8_and_later_ones_do": 0,
    "models/test_kv_cache.py::test_on_every_mesh_logits_are_those_of_one_device": 4,
    "models/test_kv_cache.py::test_one_layers_cache_at_a_time_is_dequantised": 6,
    "models/test_kv_cache.py::test_small_heads_survive_beside_large_ones_and_would_not_with_a_shared_scale": 2,
    "models/test_kv_cache.py::test_the_engine_says_the_same_on_every_mesh": 0,
    "models/test_lowering_for_hopper.py::test_a_float8_layer_s_rows_are_quantised_by_kernels": 2,
    "models/test_lowering_for_hopper.py::test_a_prompts_first_chunk_reads_no_cache": 2,
    "models/test_lowering_for_hopper.py::test_gpt_oss_has_them_too": 3,
    "models/test_lowering_for_hopper.py::test_products_rows_and_attention_have_their_kernels": 6,
    "moe/test_experts.py::test_outputs_and_gradients_equal_the_dense_definition": 2,
    "moe/test_layer.py::test_any_mesh_and_axis_names_do_without_set_mesh": 6,
    "moe/test_layer.py::test_any_number_of_dimensions": 3,
    "moe/test_layer.py::test_each_bias_is_added_once_however_many_devices_share_an_expert": 2,
    "moe/test_layer.py::test_every_device_of_a_replica_holds_the_same_bits_on_every_run": 3,
    "moe/test_layer.py::test_half_precision_stays_half_precision_and_close": 6,
    "moe/test_layer.py::test_masked_tokens_take_no_routed_expert": 3,
    "moe/test_layer.py::test_no_token_is_dropped_when_one_rank_gets_every_row": 5,
    "moe/test_layer.py::test_outputs_and_gradients_equal_the_dense_definition": 5,
    "moe/test_layer.py::test_rows_in_chunks_give_the_same": 3,
    "moe/test_layer.py::test_runs_without_jit": 0,
    "moe/test_layer.py::test_takes_x_however_it_is_sharded": 3,
    "moe/test_layer.py::test_the_compiled_program_has_one_all_reduce_and_no_other_collective": 3,
    "moe/test_linear.py::test_gate_and_up_keep_their_own_scales": 3,
    "moe/test_linear.py::test_padding_past_the_last_rows_takes_no_other_s_scale": 2,
    "moe/test_linear.py::test_where_k_is_split_a_device_has_its_columns_scales_and_those_of_its_own_x": 2,
    "moe/test_linear.py::test_where_n_is_split_a_device_has_its_rows_scales": 2,
    "moe/test_quantized_layer.py::test_routed_experts_alone_err_by_three_roundings_to_float8": 2,
    "moe/test_quantized_layer.py::test_static_and_1x128_scales_of_the_second_product_are_the_same_on_every_mesh": 6,
    "moe/test_quantized_layer.py::test_the_output_is_near_float32_over_the_same_weights": 12,
    "moe/test_quantized_layer.py::test_weight_scales_and_those_of_the_first_product_are_the_same_on_every_mesh": 9,
    "moe/test_quantized_layer.py::test_with_the_same_scales_outputs_differ_by_summation_alone": 5,
    "parity/test_parity.py::test_deepseek_v2_with_norm_topk_prob_follows_the_published_code": 2,
    "parity/test_parity.py::test_greedy_tokens_of_a_ragged_batch_are_those_of_each_prompt_alone": 3,
    "parity/test_parity.py::test_logits_with_the_cache_are_those_of_the_whole_sequence": 6,
    "parity/test_parity.py::test_the_engine_writes_the_stored_greedy_tokens": 4,
    "test_checkpoint.py::test_a_dummy_model_is_its_seeds": 0,
    "test_checkpoint.py::test_a_quantised_dummy_model_has_a_quantised_checkpoint_s_arrays": 0,
    "test_checkpoint.py::test_every_mesh_loads_the_same_arrays_and_zeros_in_their_padding": 2,
    "test_distributed.py::test_two_processes_compute_the_stored_logits_and_greedy_tokens_as_one_does": 0,
    "test_quant.py::test_dimensions_before_the_last_two_share_no_scale": 2,
    "weights_convert/test_convert.py::test_checkpoints_as_on_the_hub_convert_and_load": 3,
    "weights_convert/test_convert.py::test_every_parameter_comes_back_bit_for_bit": 3,
    "weights_convert/test_errors.py::test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room": 0,
    "weights_convert/test_quantized.py::test_bf16_is_quantised_by_the_largest_of_each_tile": 3,
    "weights_convert/test_quantized.py::test_each_layout_is_near_float32_over_its_dequantised_weights_on_every_mesh": 6,
    "weights_convert/test_to_hf.py::test_with_many_chunks_and_shards_too": 3,
    "weights_convert/test_verify.py::test_so_are_float8_checkpoints": 3,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    seen: collections.Counter[str] = collections.Counter()
    for item in items:
        name = item.nodeid.partition("[")[0].partition("tests/")[2]
        if name not in THINNED or item.get_closest_marker("slow"):
            continue
        kept = THINNED[name]
        is_nth = isinstance(kept, int)
        runs = (kept > 0 and seen[name] % kept == 0) if is_nth else item.callspec.id in kept
        seen[name] += 1
        if not runs:
            item.add_marker(pytest.mark.slow)
