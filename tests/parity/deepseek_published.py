"""DeepSeek-V2's and V3's forward pass as DeepSeek published it, in plain NumPy and float64.

Written from the arithmetic of the `modeling_deepseek.py` that the hub's checkpoints carry, sharing no code with
transformers or with us: `make_checkpoints.py` holds the expected logits against it. `without` leaves one step of the
published arithmetic out, by name, to show that a checkpoint notices.
"""

import math

import numpy as np

STEPS = {
    "deepseek_v2": (
        "softmax_mscale", "cos_sin_mscale", "yarn_floor", "yarn_ceil", "yarn", "group_limit", "routed_scaling_factor",
    ),
    "deepseek_v3": (
        "softmax_mscale", "yarn", "correction_bias", "group_limit", "group_sum", "norm_topk_prob", "routed_scaling_factor",
    ),
}  # fmt: skip


def logits(config: dict, weights: dict[str, np.ndarray], tokens: np.ndarray, without: str | None = None) -> np.ndarray:
    """Logits [S, V] for one sequence `tokens` [S]; `weights` by their names on the hub, `config` as in config.json."""
    heads, nope, eps = config["num_attention_heads"], config["qk_nope_head_dim"], config["rms_norm_eps"]
    rotations = _rotations(config, len(tokens), without)
    scale = (nope + config["qk_rope_head_dim"]) ** -0.5
    if without != "softmax_mscale":
        scale *= _mscale(config["rope_scaling"]["factor"], config["rope_scaling"]["mscale_all_dim"]) ** 2
    future = np.triu(np.ones((len(tokens), len(tokens)), bool), 1)

    def linear(name, x):
        return x @ weights[name + ".weight"].T

    # The inner norms of MLA are built without an epsilon: 1e-6, whatever rms_norm_eps says.
    def norm(name, x, eps=1e-6):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weights[name + ".weight"]

    def mlp(name, x):
        gate = linear(name + ".gate_proj", x)
        return linear(name + ".down_proj", gate / (1 + np.exp(-gate)) * linear(name + ".up_proj", x))

    def attention(name, x):
        if config["q_lora_rank"] is None:
            q = linear(name + ".q_proj", x)
        else:
            q = linear(name + ".q_b_proj", norm(name + ".q_a_layernorm", linear(name + ".q_a_proj", x)))
        q = q.reshape(len(x), heads, -1)
        latent, k_rope = np.split(linear(name + ".kv_a_proj_with_mqa", x), [config["kv_lora_rank"]], -1)
        kv = linear(name + ".kv_b_proj", norm(name + ".kv_a_layernorm", latent)).reshape(len(x), heads, -1)
        scores = np.einsum("qhd,khd->hqk", q[..., :nope], kv[..., :nope])
        q_rope, k_rope = _rotate(q[..., nope:], rotations[:, None]), _rotate(k_rope, rotations)
        scores += np.einsum("qhd,kd->hqk", q_rope, k_rope)
        probs = _softmax(np.where(future, -np.inf, scores * scale))
        return linear(name + ".o_proj", np.einsum("hqk,khd->qhd", probs, kv[..., nope:]).reshape(len(x), -1))

    def moe(name, x):
        out = mlp(name + ".shared_experts", x)
        if config["model_type"] == "deepseek_v3":
            routed = _route_v3(
                config, linear(name + ".gate", x), weights[name + ".gate.e_score_correction_bias"], without
            )
        else:
            routed = _route(config, linear(name + ".gate", x), without)
        for token, (ids, gates) in enumerate(zip(*routed, strict=True)):
            for expert, gate in zip(ids, gates, strict=True):
                out[token] += gate * mlp(f"{name}.experts.{expert}", x[token])
        return out

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        is_moe = i >= config["first_k_dense_replace"] and i % config["moe_layer_freq"] == 0
        x = x + attention(layer + ".self_attn", norm(layer + ".input_layernorm", x, eps))
        x = x + (moe if is_moe else mlp)(layer + ".mlp", norm(layer + ".post_attention_layernorm", x, eps))
    return linear("lm_head", norm("model.norm", x, eps))


def _route(config: dict, router_logits: np.ndarray, without: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and weights, both [S, top_k]. The weights are normalised or scaled, never both."""
    top_k, scores = config["num_experts_per_tok"], _softmax(router_logits)
    candidates = scores
    if config["topk_method"] == "group_limited_greedy" and without != "group_limit":
        groups = scores.reshape(len(scores), config["n_group"], -1)
        worst_first = groups.max(-1).argsort(-1)
        candidates = groups.copy()
        np.put_along_axis(candidates, worst_first[:, : -config["topk_group"], None], 0.0, 1)
        candidates = candidates.reshape(scores.shape)
    ids = candidates.argsort(-1)[:, -top_k:]
    gates = np.take_along_axis(scores, ids, -1)
    if top_k > 1 and config["norm_topk_prob"]:
        return ids, gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return ids, gates * (1.0 if without == "routed_scaling_factor" else config["routed_scaling_factor"])


def _route_v3(
    config: dict, router_logits: np.ndarray, bias: np.ndarray, without: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and weights, both [S, top_k]: chosen with the bias, weighted without it; normalised, then scaled."""
    scores = 1 / (1 + np.exp(-router_logits))
    groups = (scores if without == "correction_bias" else scores + bias).reshape(len(scores), config["n_group"], -1)
    if without != "group_limit":
        summed = 1 if without == "group_sum" else 2
        worst_first = np.sort(groups, -1)[..., -summed:].sum(-1).argsort(-1)
        np.put_along_axis(groups, worst_first[:, : -config["topk_group"], None], -np.inf, 1)
    ids = groups.reshape(scores.shape).argsort(-1)[:, -config["num_experts_per_tok"] :]
    gates = np.take_along_axis(scores, ids, -1)
    if config["num_experts_per_tok"] > 1 and config["norm_topk_prob"] and without != "norm_topk_prob":
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return ids, gates * (1.0 if without == "routed_scaling_factor" else config["routed_scaling_factor"])


def _rotations(config: dict, length: int, without: str | None) -> np.ndarray:
    """YaRN's rotation of each pair at each position, as complex numbers [S, qk_rope_head_dim / 2]."""
    yarn, base, dim = config["rope_scaling"], config["rope_theta"], config["qk_rope_head_dim"]

    def correction_dim(turns):
        return dim * math.log(yarn["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction_dim(yarn["beta_fast"]), correction_dim(yarn["beta_slow"])
    low = max(low if without == "yarn_floor" else math.floor(low), 0)
    high = min(high if without == "yarn_ceil" else math.ceil(high), dim - 1)
    # low == high happens in tiny models; the published code then steps by a thousandth.
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    frequency = base ** (-np.arange(0, dim, 2) / dim)
    if without != "yarn":
        frequency = frequency / yarn["factor"] * ramp + frequency * (1 - ramp)
    magnitude = _mscale(yarn["factor"], yarn["mscale"]) / _mscale(yarn["factor"], yarn["mscale_all_dim"])
    if without == "cos_sin_mscale":
        magnitude = 1.0
    return magnitude * np.exp(1j * np.outer(np.arange(length), frequency))


def _rotate(x: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Neighbouring elements are a pair. Published code also moves the halves apart, in q and k alike: no difference."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * rotations
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
