"""How the results of `bench.moe_layer` are shown. Needs neither JAX nor torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.roofline import best_of, number, precision, rank

OURS, WITH_SHARED = "ours", "ours with shared experts"
TORCH_LAYER, VLLM, SGLANG = "torch layer", "vLLM fused", "SGLang fused"
TORCH_PEERS = (TORCH_LAYER, VLLM, SGLANG)
MOE_SCOPES = ("router", "plan", "quantize", "gate_up", "down", "combine", "shared_experts")  # those of `EPMoE`
OTHER = "other"  # in none of the scopes asked for
PARTS = (*MOE_SCOPES, OTHER)
TOLERANCE = 1e-2  # three roundings to bfloat16, where a product has one
FLOAT8_TOLERANCE = 3e-2  # a sum that is little off may round to the next float8, an eighth away
_IN_THE_FLOOR = ("gate_up", "down", "combine")


def tolerance(case: dict[str, Any]) -> float:
    """Which errors are right."""
    return FLOAT8_TOLERANCE if case.get("quantize") else TOLERANCE


def best_peer(case: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The fastest peer whose numbers are right."""
    peers = {name: result for name, result in case["results"].items() if name in TORCH_PEERS}
    return best_of(peers, lambda _: tolerance(case))


def ratio(case: dict[str, Any]) -> float | None:
    """The best peer's time over ours without the router, which peers do not run; over all of ours where that is not known."""
    ours, best = case["results"][OURS], best_peer(case)
    if "failed" in ours or not best:
        return None
    return best[1]["device_us"] / (ours["device_us"] - ours["parts"].get("router", 0))


def outside_us(result: dict[str, Any]) -> float | None:
    """What is spent outside both products and combine; None where the parts are not known."""
    parts = result["parts"]
    return sum(us for name, us in parts.items() if name not in _IN_THE_FLOOR) if parts else None


def case_table(case: dict[str, Any]) -> str:
    """One case: a line for each implementation."""
    lines = [
        f"{case['model']} {case['layout']}, {case['tokens']} tokens, {case['load']}: rank {case['rank']} has {case['rows']} "
        f"rows, at most {case['most_rows_of_an_expert']} of each of {case['experts_used']} experts; floor "
        f"{case['floor_us']:.1f} us",
        f"  {'':26}{'device us':>10}{'stream':>9}{'x floor':>8}{'error':>9}  parts",
    ]
    for name, result in case["results"].items():
        if "failed" in result:
            lines.append(f"  {name:26}{result['failed']}")
            continue
        us, parts = result["device_us"], result.get("parts", {})
        lines.append(
            f"  {name:26}{us:10.1f}{number(result['stream_us'], 9)}{us / case['floor_us']:8.2f}"
            f"{number(result['error'], 9, '.1e')}  "
            + ", ".join(f"{part} {parts[part]:.1f}" for part in PARTS if part in parts)
            + ("  WRONG" if result["error"] is not None and rank(result, tolerance(case))[1] else "")
        )
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """One line a case with its parts, then one line a load of every model and number of tokens: EP against TP."""
    head = f"{'model':18}{'':4}{'tokens':>6} {'load':9}{'us':>9}{'stream':>9}{'floor':>9}{'x floor':>8}{'outside':>8}"
    lines = [head + "".join(f"{name.removesuffix('_experts'):>9}" for name in PARTS) + f"{'peers':>7}  best peer"]
    for case in result["cases"]:
        line = f"{case['model']:18}{case['layout']:4}{case['tokens']:6} {case['load']:9}"
        ours, best = case["results"][OURS], best_peer(case)
        if "failed" in ours:
            lines.append(f"{line}{ours['failed'][:100]}")
            continue
        # Shared experts are another program's, if anyone's.
        parts = {**case["results"].get(WITH_SHARED, {}).get("parts", {}), **ours["parts"]}
        line += f"{ours['device_us']:9.1f}{number(ours['stream_us'], 9)}{case['floor_us']:9.1f}"
        line += f"{ours['device_us'] / case['floor_us']:8.2f}{number(outside_us(ours), 8)}"
        line += "".join(number(parts.get(name), 9) for name in PARTS)
        lines.append(f"{line}{number(ratio(case), 7, '.2f')}  {best[0] if best else '-'}")
    return "\n".join([*lines, "", *_ep_against_tp(result["cases"])])


def _ep_against_tp(cases: Sequence[dict[str, Any]]) -> list[str]:
    """EP's slowest rank and TP's, in us; their ratio; and what each load costs over a balanced one."""
    lines = [f"{'model':18}{'tokens':>6} {'load':9}{'EP8 us':>9}{'TP8 us':>9}{'TP / EP':>9}{'EP: x balanced':>16}"]
    times = _times(cases)
    for model, tokens, load in dict.fromkeys(key[:3] for key in times):
        expert, tensor = (times.get((model, tokens, load, layout)) for layout in ("EP8", "TP8"))
        balanced = times.get((model, tokens, "balanced", "EP8"))
        line = f"{model:18}{tokens:6} {load:9}{number(expert, 9)}{number(tensor, 9)}"
        line += number(tensor / expert if tensor and expert else None, 9, ".2f")
        lines.append(line + number(expert / balanced if expert and balanced else None, 16, ".2f"))
    return lines


def _times(cases: Sequence[dict[str, Any]]) -> dict[tuple[str, int, str, str], float]:
    """Our microseconds, by model, tokens, load and layout; without what failed."""
    return {
        (case["model"], case["tokens"], case["load"], case["layout"]): case["results"][OURS]["device_us"]
        for case in cases
        if "failed" not in case["results"][OURS]
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws EP's and TP's times as bars, a panel for each number of tokens, in units of EP's floor; black lines are the floors.

    Of the first load that was measured.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    load = result["cases"][0]["load"]
    cases = [case for case in result["cases"] if case["load"] == load]
    times = _times(cases)
    floors = {(case["model"], case["tokens"], case["layout"]): case["floor_us"] for case in cases}
    all_tokens = sorted({case["tokens"] for case in cases}, reverse=True)
    rows = -(-len(all_tokens) // 2)
    figure, panels = pyplot.subplots(rows, 2, figsize=(11, 4 * rows), layout="constrained", squeeze=False, sharey=True)
    for axes in panels.flat[len(all_tokens) :]:
        axes.set_visible(False)
    for axes, tokens in zip(panels.flat, all_tokens, strict=False):
        models = [model for model in dict.fromkeys(case["model"] for case in cases) if (model, tokens, "EP8") in floors]
        for side, (layout, color) in enumerate((("EP8", "tab:blue"), ("TP8", "tab:orange"))):
            for place, model in enumerate(models):
                us, floor = times.get((model, tokens, load, layout)), floors.get((model, tokens, layout))
                if us is None or floor is None:
                    continue
                unit, x = floors[model, tokens, "EP8"], place + 0.4 * side - 0.2
                axes.bar(x, us / unit, 0.38, color=color, label=layout)
                axes.hlines(floor / unit, x - 0.19, x + 0.19, color="black", linewidth=1.5)
                above = max(us, floor) / unit  # no line through a figure
                axes.annotate(f"{us:.0f}", (x, above), (0, 2), textcoords="offset points", fontsize=8, ha="center")
        axes.set_xticks(range(len(models)), models, rotation=20, ha="right", fontsize=8)
        axes.set_title(f"{tokens} tokens", fontsize=10)
        axes.margins(y=0.1)
    handles, labels = panels[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(list(unique.values()), list(unique), loc="outside upper right")
    figure.supylabel("time / floor of EP8; figures: us", fontsize=10)
    figure.suptitle(
        f"MoE layer, one rank of 8, {precision(result)}, {load} load, {result['device']}; black: the floor", fontsize=10
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
