"""Makes checkpoints/: small MoE checkpoints in the Hugging Face hub's layout, and what a right model computes on them.

Run it where PyTorch is; the parity tests need only its output, which is committed:

    python3.11 -m venv .torchenv
    .torchenv/bin/pip install torch==2.13.0 transformers==5.17.0 tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6
    .torchenv/bin/python tests/parity/make_checkpoints.py [NAME ...]

Weights are random, seeded, and drawn with NumPy, so that the same seed gives the same files. A seed is taken only when
the float32 result has no near-tie in any greedy token or routing decision; the search starts at the seed recorded in
CHECKPOINTS. Tensors are named and shaped here as on the hub, not by transformers, which must then load every one.

Expected values are transformers', in float32 from the bf16 weights. For DeepSeek-V2 the code that DeepSeek published
decides: `follow_published` patches transformers where it differs, and `check_published` compares the result with
`deepseek_v2_published.py`, an independent implementation.
"""

import itertools
import json
import sys
from pathlib import Path

import deepseek_v2_published
import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "checkpoints"
BATCH, LENGTH, NEW_TOKENS = 3, 24, 12
GREEDY_MARGIN, ROUTING_MARGIN = 0.03, 1e-3  # in logits; float32 implementations differ by some 1e-5
PROMPTS = ["a", "Mixture", "Each token\nmeets two experts", "The router sends the tokens to other ranks."]
MERGES = ["t h", "th e", "e r", "Ġ t", "o n", "r e", "Ġ the", "i n", "e n", "e s"]
CHAT = [
    {"role": "user", "content": "Who are the experts?"},
    {"role": "assistant", "content": "Not I."},
    {"role": "user", "content": "Then who?"},
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ '[' + message['role'] + '] ' + message['content'] + ' [reply]' }}{% endif %}"
    "{% endfor %}"
)

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
    "model_type": "mixtral",
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 12,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": 9,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 269,
}

OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "clip_qkv": None,
    "dtype": "bfloat16",
    "eos_token_id": 267,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 13,
    "max_position_embeddings": 512,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 8,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True,
    "transformers_version": "5.17.0",
    "use_cache": True,
    "vocab_size": 277,
}

DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 261,
    "eos_token_id": 262,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 51,
    "kv_lora_rank": 16,
    "max_position_embeddings": 640,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 26,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 16,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 6,
    "vocab_size": 263,
}

DEEPSEEK_V2 = DEEPSEEK_V2_LITE | {
    "bos_token_id": 263,
    "ep_size": 1,
    "eos_token_id": 264,
    "intermediate_size": 45,
    # Longer than any test: only so do both ends of YaRN's ramp lie inside the rotary dimensions, where rounding shows.
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 15,
    "n_group": 4,
    "n_routed_experts": 24,
    "num_experts_per_tok": 4,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    # The hub's V2 has 1.0 twice. Two different values make the scale of cos and sin differ from 1.
    "rope_scaling": DEEPSEEK_V2_LITE["rope_scaling"] | {"mscale": 1.0, "original_max_position_embeddings": 1024},
    "routed_scaling_factor": 2.5,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "transformers_version": "4.39.3",
    "vocab_size": 271,
}

# name: (config.json, first seed to try, shards, merges in the tokenizer)
CHECKPOINTS = {
    "mixtral": (MIXTRAL, 11, 1, 10),
    "olmoe": (OLMOE, 151, 3, 10),
    "deepseek_v2_lite": (DEEPSEEK_V2_LITE, 15, 1, 5),
    "deepseek_v2": (DEEPSEEK_V2, 1, 1, 7),
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor that the hub's checkpoint of this family has, by name, as torch stores it ([out, in])."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = _mixtral_layer if config["model_type"] == "mixtral" else _olmoe_layer
        block = _deepseek_layer(config, i) if config["model_type"] == "deepseek_v2" else layer(config)
        block |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _gqa(config: dict) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _mlp(prefix: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _mixtral_layer(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, intermediate, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = _gqa(config) | {"block_sparse_moe.gate": (experts, hidden)}
    for e in range(experts):
        w1_w2_w3 = [(intermediate, hidden), (hidden, intermediate), (intermediate, hidden)]
        shapes |= {f"block_sparse_moe.experts.{e}.w{n}": shape for n, shape in enumerate(w1_w2_w3, 1)}
    return shapes


def _olmoe_layer(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, experts, attention = config["hidden_size"], config["num_experts"], _gqa(config)
    norms = {f"self_attn.{n}_norm": attention[f"self_attn.{n}_proj"][:1] for n in "qk"}
    shapes = attention | norms | {"mlp.gate": (experts, hidden)}
    for e in range(experts):
        shapes |= _mlp(f"mlp.experts.{e}", hidden, config["intermediate_size"])
    return shapes


def _deepseek_layer(config: dict, i: int) -> dict[str, tuple[int, ...]]:
    hidden, heads, q_rank, kv_rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, v = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    attention = {"q_proj": (heads * (nope + rope), hidden)}
    if q_rank:
        attention = {
            "q_a_proj": (q_rank, hidden),
            "q_a_layernorm": (q_rank,),
            "q_b_proj": (heads * (nope + rope), q_rank),
        }
    attention |= {
        "kv_a_proj_with_mqa": (kv_rank + rope, hidden),
        "kv_a_layernorm": (kv_rank,),
        "kv_b_proj": (heads * (nope + v), kv_rank),
        "o_proj": (hidden, heads * v),
    }
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    if i < config["first_k_dense_replace"]:
        return shapes | _mlp("mlp", hidden, config["intermediate_size"])
    intermediate = config["moe_intermediate_size"]
    shapes["mlp.gate"] = (config["n_routed_experts"], hidden)
    for e in range(config["n_routed_experts"]):
        shapes |= _mlp(f"mlp.experts.{e}", hidden, intermediate)
    return shapes | _mlp("mlp.shared_experts", hidden, config["n_shared_experts"] * intermediate)


def draw_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Seeded bf16 weights: norms around 1, matrices so large that attention, router and logits are far from uniform."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in tensor_shapes(config).items():
        x = rng.standard_normal(shape)
        if "norm" in name:
            x = 1 + 0.25 * x
        elif name == "model.embed_tokens.weight":
            x *= 3 * shape[1] ** -0.5 if config["tie_word_embeddings"] else 1
        else:
            gain = 3 if name == "lm_head.weight" else 2 if "gate.weight" in name else 1.5
            x *= gain * shape[1] ** -0.5
        weights[name] = torch.from_numpy(x).to(torch.bfloat16)
    return weights


def save_weights(weights: dict[str, torch.Tensor], path: Path, shards: int) -> None:
    """One model.safetensors, or `shards` of about equal size and their index."""
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        return
    sizes = [x.nbytes for x in weights.values()]
    shard_of = [start * shards // sum(sizes) for start in itertools.accumulate(sizes[:-1], initial=0)]
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in shard_of]
    for file in sorted(set(files)):
        part = {name: x for (name, x), its_file in zip(weights.items(), files, strict=True) if its_file == file}
        save_file(part, path / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(zip(weights, files, strict=True)))}
    write_json(path / "model.safetensors.index.json", index)


def save_tokenizer(config: dict, path: Path, merges: int) -> None:
    """A byte-level BPE: 256 bytes and the first `merges` MERGES; <s> and </s> where the family keeps them."""
    tokens = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + [m.replace(" ", "") for m in MERGES[:merges]]
    specials = ["<unk>", "<s>", "</s>"] if config["model_type"] == "mixtral" else ["<s>", "</s>"]
    tokens = specials + tokens if config["model_type"] == "mixtral" else tokens + specials
    vocab = {token: i for i, token in enumerate(tokens)}
    has_bos = config["bos_token_id"] is not None
    assert vocab["</s>"] == config["eos_token_id"]
    assert config["bos_token_id"] in (None, vocab["<s>"])

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [tuple(m.split()) for m in MERGES[:merges]]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in specials])
    if has_bos:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    bpe.save(str(path / "tokenizer.json"))

    names = {"eos_token": "</s>"} | ({"bos_token": "<s>"} if has_bos else {})
    names |= {"unk_token": "<unk>"} if "<unk>" in vocab else {}
    chat = {"chat_template": CHAT_TEMPLATE} if config["model_type"] == "mixtral" else {}
    settings = {
        "added_tokens_decoder": {
            str(vocab[token]): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in specials
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(path / "tokenizer_config.json", settings | names | chat)


def follow_published(model) -> None:
    """Patches a transformers DeepSeek-V2 to do what DeepSeek's own code does.

    transformers 5.17.0 ignores norm_topk_prob: it always multiplies by routed_scaling_factor. Published code normalises
    *instead* of scaling. Dividing by the sum takes the factor out again.
    """
    if model.config.norm_topk_prob and model.config.num_experts_per_tok > 1:
        for layer in model.model.layers[model.config.first_k_dense_replace :]:
            layer.mlp.gate.register_forward_hook(
                lambda _, __, out: (out[0], out[1] / (out[1].sum(-1, keepdim=True) + 1e-20), out[2])
            )


def load_model(path: Path, **overrides):
    """The checkpoint as transformers reads it, in float32; `overrides` replace values of config.json."""
    # Eager experts too: the default, torch's grouped_mm, refuses odd intermediate sizes.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, **eager, **overrides
    )
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems, f"transformers did not take {path.name} as it is: {problems}"
    if model.config.model_type == "deepseek_v2":
        follow_published(model)
    return model.eval()


class RoutingMargin:
    """The smallest distance, in router logits, between a chosen expert (or group) and one that was not."""

    def __init__(self, model, config: dict):
        self.smallest, self.config = float("inf"), config
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _, __, out: self._see(out[0]))

    def _see(self, router_logits: torch.Tensor) -> None:
        if self.config.get("topk_method") == "group_limited_greedy":
            groups = router_logits.unflatten(-1, (self.config["n_group"], -1))
            best = groups.amax(-1).sort(-1, descending=True)
            self._gap(best.values, self.config["topk_group"])
            keep = best.indices[:, : self.config["topk_group"], None].expand(-1, -1, groups.shape[-1])
            router_logits = groups.gather(1, keep).flatten(1)
        self._gap(router_logits.sort(-1, descending=True).values, self.config["num_experts_per_tok"])

    def _gap(self, ordered: torch.Tensor, chosen: int) -> None:
        self.smallest = min(self.smallest, (ordered[:, chosen - 1] - ordered[:, chosen]).min().item())


@torch.no_grad()
def expected_values(config: dict, path: Path, seed: int) -> tuple[dict[str, np.ndarray] | None, str]:
    """The arrays of expected.npz, or None and the reason when the seed makes a poor test."""
    model, tokenizer = load_model(path), transformers.AutoTokenizer.from_pretrained(path)
    routing = RoutingMargin(model, config)
    tokens = np.random.default_rng([seed, 1]).integers(0, config["vocab_size"], (BATCH, LENGTH), np.int32)
    logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()

    prompts, greedy, margin = [tokenizer(text).input_ids for text in PROMPTS], [], float("inf")
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(NEW_TOKENS):
            best = model(ids, use_cache=False).logits[0, -1].topk(2)
            margin = min(margin, (best.values[0] - best.values[1]).item())
            ids = torch.cat([ids, best.indices[:1, None]], 1)
        greedy.append(ids[0, len(prompt) :].tolist())

    summary = f"seed {seed}: greedy margin {margin:.3f}, routing margin {routing.smallest:.4f}, std {logits.std():.2f}"
    ordinary = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    if margin < GREEDY_MARGIN or routing.smallest < ROUTING_MARGIN:
        return None, summary
    if any(len(set(ids)) < 5 or not ordinary.issuperset(ids) for ids in greedy):
        return None, summary + ", dull or unprintable greedy text"

    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    arrays = {
        "tokens": tokens,
        "logits": logits,
        "prompts": padded,
        "prompt_lengths": lengths,
        "prompt_text": np.array(PROMPTS),
        "greedy": np.array(greedy, np.int32),
        "greedy_text": np.array([tokenizer.decode(ids) for ids in greedy]),
    }
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template(CHAT, tokenize=False)
        arrays["chat_messages"] = np.array(json.dumps(CHAT))
        arrays["chat_text"] = np.array(chat)
        arrays["chat_ids"] = np.array(tokenizer(chat, add_special_tokens=False).input_ids, np.int32)
    if config["model_type"] == "deepseek_v2":
        normalised = load_model(path, norm_topk_prob=True)(torch.from_numpy(tokens).long(), use_cache=False)
        if config["topk_method"] == "group_limited_greedy":
            arrays["logits_norm_topk_prob"] = normalised.logits.numpy()
        check_published(config, path, tokens, logits, normalised.logits.numpy())
    return arrays, summary


def check_published(config: dict, path: Path, tokens: np.ndarray, logits: np.ndarray, normalised: np.ndarray) -> None:
    """Asserts that the patched logits are those of the published arithmetic, and prints what each step of it moves."""
    weights = {}
    for file in path.glob("*.safetensors"):
        weights |= {k: v.double().numpy() for k, v in load_file(file).items()}

    def published(config, without=None):
        return np.stack([deepseek_v2_published.logits(config, weights, row, without) for row in tokens])

    expected = published(config)
    assert np.abs(logits - expected).max() < 1e-3, np.abs(logits - expected).max()
    renormalised = published(config | {"norm_topk_prob": True})
    assert np.abs(normalised - renormalised).max() < 1e-3, np.abs(normalised - renormalised).max()
    moved = {step: np.abs(published(config, step) - expected).max() for step in deepseek_v2_published.STEPS}
    moved["norm_topk_prob"] = np.abs(renormalised - expected).max()
    print(f"  published arithmetic: largest error {np.abs(logits - expected).max():.1e}; largest change without")
    print("   ", ", ".join(f"{step} {change:.2g}" for step, change in moved.items()))


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def make(name: str) -> None:
    config, first_seed, shards, merges = CHECKPOINTS[name]
    path = HERE / name
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", dict(sorted(config.items())))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    version = {"transformers_version": config["transformers_version"]}
    write_json(path / "generation_config.json", {"_from_model_config": True} | ids | version)
    save_tokenizer(config, path, merges)
    for seed in itertools.count(first_seed):
        save_weights(draw_weights(config, seed), path, shards)
        arrays, summary = expected_values(config, path, seed)
        print(f"{name}: {summary}", flush=True)
        if arrays:
            break
    np.savez_compressed(path / "expected.npz", **arrays)
    for file in path.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for checkpoint in sys.argv[1:] or CHECKPOINTS:
        make(checkpoint)
