"""Makes checkpoints/: small MoE checkpoints in the Hugging Face hub's layout, and what a right model computes on them.

Run it where PyTorch is; the parity tests need only its output, which is committed:

    python3.11 -m venv .torchenv
    .torchenv/bin/pip install torch==2.13.0 transformers==5.17.0 tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6 accelerate==1.15.0
    .torchenv/bin/python tests/parity/make_checkpoints.py [NAME ...]

Weights are random, seeded, and drawn with NumPy, so that the same seed gives the same files. A seed is taken only when
the float32 result has no near-tie in any greedy token or routing decision; the search starts at the seed recorded in
CHECKPOINTS. Tensors are named and shaped here as on the hub, not by transformers, which must then load every one.

Expected values are transformers', in float32 from the bf16 weights. For DeepSeek-V2 and V3 the code that DeepSeek
published decides: `follow_published` patches transformers where it differs, and `check_published` compares the result with
`deepseek_published.py`, an independent implementation.
"""

import itertools
import json
import sys
from pathlib import Path

import deepseek_published
import hub_configs
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

# name: (config.json, first seed to try, shards, merges in the tokenizer)
CHECKPOINTS = {
    "mixtral": (hub_configs.MIXTRAL, 11, 1, 10),
    "olmoe": (hub_configs.OLMOE, 151, 3, 10),
    "deepseek_v2_lite": (hub_configs.DEEPSEEK_V2_LITE, 15, 1, 5),
    "deepseek_v2": (hub_configs.DEEPSEEK_V2, 1, 1, 7),
    "deepseek_v3": (hub_configs.DEEPSEEK_V3, 38, 1, 9),
    "dots1": (hub_configs.DOTS1, 630, 1, 6),
    "glm4_moe": (hub_configs.GLM4_MOE, 78, 1, 4),
    "gpt_oss": (hub_configs.GPT_OSS, 2, 1, 5),
    "gpt_oss_mxfp4": (hub_configs.GPT_OSS_MXFP4, 42, 2, 5),
    "qwen2_moe": (hub_configs.QWEN2_MOE, 41, 1, 6),
    "qwen3_moe": (hub_configs.QWEN3_MOE, 71, 1, 8),
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor that the hub's checkpoint of this family has, by name, as torch stores it ([out, in])."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    mtp_layers = range(
        config["num_hidden_layers"], config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)
    )
    for i in (*range(config["num_hidden_layers"]), *mtp_layers):
        block = LAYERS[config["model_type"]](config, i)
        block |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        block |= _mtp_extras(config) if i in mtp_layers else {}
        shapes |= {f"model.layers.{i}.{_with_suffix(name)}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _mtp_extras(config: dict) -> dict[str, tuple[int, ...]]:
    """What a layer for multi-token prediction has besides a decoder layer's tensors."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    norms = dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (hidden,))
    return norms | {
        "eh_proj": (hidden, 2 * hidden),
        "embed_tokens": (vocab, hidden),
        "shared_head.head": (vocab, hidden),
    }


def _with_suffix(name: str) -> str:
    is_parameter = name.endswith(("bias", "sinks")) or name.startswith(("mlp.experts.gate_up", "mlp.experts.down"))
    return name if is_parameter else f"{name}.weight"


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


def _mixtral_layer(config: dict, i: int) -> dict[str, tuple[int, ...]]:
    hidden, intermediate, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = _gqa(config) | {"block_sparse_moe.gate": (experts, hidden)}
    for e in range(experts):
        w1_w2_w3 = [(intermediate, hidden), (hidden, intermediate), (intermediate, hidden)]
        shapes |= {f"block_sparse_moe.experts.{e}.w{n}": shape for n, shape in enumerate(w1_w2_w3, 1)}
    return shapes


def _olmoe_layer(config: dict, i: int) -> dict[str, tuple[int, ...]]:
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
    return {f"self_attn.{name}": shape for name, shape in attention.items()} | _deepseek_mlp(config, i)


def _deepseek_mlp(config: dict, i: int) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config["hidden_size"], config["moe_intermediate_size"]
    if i < config["first_k_dense_replace"]:
        return _mlp("mlp", hidden, config["intermediate_size"])
    shapes = {"mlp.gate": (config["n_routed_experts"], hidden)}
    if config["model_type"] != "deepseek_v2":
        shapes["mlp.gate.e_score_correction_bias"] = shapes["mlp.gate"][:1]
    for e in range(config["n_routed_experts"]):
        shapes |= _mlp(f"mlp.experts.{e}", hidden, intermediate)
    return shapes | _mlp("mlp.shared_experts", hidden, config["n_shared_experts"] * intermediate)


def _glm_layer(config: dict, i: int) -> dict[str, tuple[int, ...]]:
    return _gqa(config) | _qkv_bias(config) | _head_norms(config) | _deepseek_mlp(config, i)


def _dots_layer(config: dict, i: int) -> dict[str, tuple[int, ...]]:
    return _gqa(config) | _head_norms(config) | _deepseek_mlp(config, i)


def _qkv_bias(config: dict) -> dict[str, tuple[int, ...]]:
    attention = _gqa(config)
    return {f"self_attn.{n}_proj.bias": attention[f"self_attn.{n}_proj"][:1] for n in "qkv"}


def _gpt_oss_layer(config: dict, i: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = _gqa(config) | _qkv_bias(config)
    shapes |= {"self_attn.o_proj.bias": (hidden,), "self_attn.sinks": (config["num_attention_heads"],)}
    shapes |= {"mlp.router": (experts, hidden), "mlp.router.bias": (experts,)}
    for name, n, k in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        if "quantization_config" in config:
            shapes[f"mlp.experts.{name}_blocks"] = (experts, n, k // 32, 16)
            shapes[f"mlp.experts.{name}_scales"] = (experts, n, k // 32)
        else:
            shapes[f"mlp.experts.{name}"] = (experts, k, n)
        shapes[f"mlp.experts.{name}_bias"] = (experts, n)
    return shapes


def _head_norms(config: dict) -> dict[str, tuple[int, ...]]:
    return {f"self_attn.{n}_norm": (config["head_dim"],) for n in "qk"}


def _qwen_layer(config: dict, i: int) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    shapes = _gqa(config) | (_head_norms(config) if config["model_type"] == "qwen3_moe" else _qkv_bias(config))
    if i in config["mlp_only_layers"] or (i + 1) % config["decoder_sparse_step"] != 0:
        return shapes | _mlp("mlp", hidden, config["intermediate_size"])
    shapes["mlp.gate"] = (config["num_experts"], hidden)
    for e in range(config["num_experts"]):
        shapes |= _mlp(f"mlp.experts.{e}", hidden, config["moe_intermediate_size"])
    if config["model_type"] == "qwen2_moe":
        shapes |= _mlp("mlp.shared_expert", hidden, config["shared_expert_intermediate_size"])
        shapes["mlp.shared_expert_gate"] = (1, hidden)
    return shapes


LAYERS = {
    "mixtral": _mixtral_layer,
    "olmoe": _olmoe_layer,
    "deepseek_v2": _deepseek_layer,
    "deepseek_v3": _deepseek_layer,
    "dots1": _dots_layer,
    "glm4_moe": _glm_layer,
    "gpt_oss": _gpt_oss_layer,
    "qwen2_moe": _qwen_layer,
    "qwen3_moe": _qwen_layer,
}


GAINS = {"lm_head.weight": 3, "gate.weight": 2, "router.weight": 2, "gate_up_proj": 4}


def draw_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Seeded bf16 weights: norms around 1, matrices so large that attention, router and logits are far from uniform."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith(("_blocks", "_scales")):
            # Numbers are 2.9 on average; gates and ups become so large that some are clamped.
            power = 125 if "gate_up" in name else 123
            low, high = (0, 256) if name.endswith("_blocks") else (power - 1, power + 2)
            weights[name] = torch.from_numpy(rng.integers(low, high, shape, np.uint8))
            continue
        x = rng.standard_normal(shape)
        if "norm" in name:
            x = 1 + 0.25 * x
        elif name.endswith("sinks"):
            x *= 2
        elif name.endswith("bias"):
            x *= 0.2 if name.endswith("correction_bias") else 0.5
        elif name == "model.embed_tokens.weight":
            x *= 3 * shape[1] ** -0.5 if config["tie_word_embeddings"] else 1
        else:
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.5)
            x *= gain * shape[1] ** -0.5
        # The hub has the correction bias in float32, whatever the weights are in.
        dtype = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
        weights[name] = torch.from_numpy(x).to(dtype)
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
    mtp_layers = tuple(f"model.layers.{model.config.num_hidden_layers + i}." for i in range(2))
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not name.startswith(mtp_layers)]
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems, f"transformers did not take {path.name} as it is: {problems}"
    if model.config.model_type == "deepseek_v2":
        follow_published(model)
    return model.eval().float()  # what was in MXFP4 transformers has made bf16 of, whatever it was asked


class RoutingMargin:
    """The smallest distance between a chosen expert (or group) and one that was not.

    In router logits, or, where a correction bias takes part, in what is compared: a sigmoid plus the bias.
    """

    def __init__(self, model, config: dict):
        self.smallest, self.config = float("inf"), config
        for name, module in model.named_modules():
            if name.endswith(("mlp.gate", "mlp.router")):
                module.register_forward_hook(lambda router, _, out: self._see(router, out[0]))

    def _see(self, router: torch.nn.Module, choice: torch.Tensor) -> None:
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            choice = choice.sigmoid() + bias
        if self.config.get("topk_group", 1) < self.config.get("n_group", 1):
            groups = choice.unflatten(-1, (self.config["n_group"], -1))
            scores = groups.amax(-1) if bias is None else groups.topk(2).values.sum(-1)
            best = scores.sort(-1, descending=True)
            self._gap(best.values, self.config["topk_group"])
            keep = best.indices[:, : self.config["topk_group"], None].expand(-1, -1, groups.shape[-1])
            choice = groups.gather(1, keep).flatten(1)
        self._gap(choice.sort(-1, descending=True).values, self.config["num_experts_per_tok"])

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
    if config["model_type"] in deepseek_published.STEPS:
        check_published(config, path, tokens, logits)
    if config["model_type"] == "deepseek_v2":
        renormalising = load_model(path, norm_topk_prob=True)
        normalised = renormalising(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
        check_published(config | {"norm_topk_prob": True}, path, tokens, normalised)
        if config["topk_method"] == "group_limited_greedy":
            arrays["logits_norm_topk_prob"] = normalised
    return arrays, summary


def check_published(config: dict, path: Path, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Asserts that the logits are those of the published arithmetic, and prints what each step of it moves."""
    weights = {}
    for file in path.glob("*.safetensors"):
        weights |= {k: v.double().numpy() for k, v in load_file(file).items()}

    def published(without=None):
        return np.stack([deepseek_published.logits(config, weights, row, without) for row in tokens])

    expected = published()
    error = np.abs(logits - expected).max()
    assert error < 1e-3, error
    steps = deepseek_published.STEPS[config["model_type"]]
    moved = {step: np.abs(published(step) - expected).max() for step in steps}
    print(f"  published arithmetic: largest error {error:.1e}; largest change without")
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
