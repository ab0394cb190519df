"""How the results of `bench.multi_gpu` are shown. Needs no JAX."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.layer_tables import MOE_SCOPES, OTHER
from bench.roofline import number

PARTS = ("attention", *MOE_SCOPES, OTHER, "collective", "wait")
_SHORT = {"shared_experts": "shared", "collective": "coll."}
ONE = "one device"


def head(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['devices']} x {result['device']}; {versions}\n"
        f"{result['model']}: {result['layers']} of {result['model_layers']} layers, {result['moe_layers']} with experts, random "
        f"weights; prompts of {result['prompt_length']}, decoding at {result['context']}; NVLink multicast off"
    )


def row_line(row: dict[str, Any]) -> str:
    """A row as it is measured."""
    line = f"{row['quantize']} {row['mode']}, {row['phase']} {row['tokens']}, {row['load']}, {row['variant']}: "
    if "failed" in row:
        return line + row["failed"]
    line += f"{row['step_us'] / 1e3:.3f} ms, {row['tokens_per_s']:.0f} tokens/s"
    return line + (f"; a layer {row['layer_us']:.0f} us" if "layer_us" in row else f"; no parts: {row['no_parts']}")


def summary(result: dict[str, Any]) -> str:
    sections = [head(result), links(result), *_rows(result), ratios(result), variants(result), checks(result)]
    return "\n\n".join(section for section in sections if section)


def links(result: dict[str, Any]) -> str:
    """Collectives alone: us, and GB/s that each device sends."""
    if not result["links"]:
        return ""
    lines = [f"collectives alone  {'tokens':>7}{'MB':>9}{'us':>10}{'GB/s':>8}"]
    for link in result["links"]:
        line = f"{link['kind']:18}{link['tokens']:8}"
        lines.append(
            f"{line} {link['failed']}"
            if "failed" in link
            else f"{line}{link['bytes'] / 1e6:9.2f}{link['us']:10.1f}{link['gbs']:8.1f}"
        )
    return "\n".join(lines)


def _rows(result: dict[str, Any]) -> Iterable[str]:
    """A table for each step: a line a mode."""
    for case in dict.fromkeys(_case(row) for row in result["rows"]):
        quantize, phase, tokens, load = case
        rows = [row for row in result["rows"] if _case(row) == case]
        lines = [
            f"{quantize}, {phase} {tokens}, {load}; a layer with experts, us",
            f"{'':28}{'tokens/s':>10}{'model':>8}{'step ms':>9}{'layer':>8}"
            + "".join(f"{_SHORT.get(part, part):>10}" for part in PARTS)
            + f"{'comm.':>7}{'GB/s':>7}{'/alone':>7}{'skew':>6}",
        ]
        for row in rows:
            name = row["mode"] + ("" if row["variant"] == "default" else f", {row['variant']}")
            if "failed" in row:
                lines.append(f"{name:28}{row['failed'][:120]}")
                continue
            parts = row.get("parts", {})
            lines.append(
                f"{name:28}{row['tokens_per_s']:10.0f}{number(row.get('model_tokens_per_s'), 8, '.0f')}"
                f"{row['step_us'] / 1e3:9.3f}{number(row.get('layer_us'), 8, '.0f')}"
                + "".join(number(parts.get(part), 10, ".1f") for part in PARTS)
                + f"{number(communication(row), 7, '.0%')}{number(_gbs(row), 7, '.0f')}{number(of_alone(row, result), 7, '.0%')}"
                + f"{row['rows']['device_max_over_mean']:6.2f}"
            )
        yield "\n".join(lines)


def _case(row: dict[str, Any]) -> tuple[str, str, int, str]:
    return row["quantize"], row["phase"], row["tokens"], row["load"]


def _exchanged(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if row["mode"] == ONE else row.get("collectives", [])


def communication(row: dict[str, Any]) -> float | None:
    """The share of a layer's kernel times that its collectives and the waits for them take."""
    parts = row.get("parts")
    return (parts.get("collective", 0.0) + parts.get("wait", 0.0)) / sum(parts.values()) if parts else None


def _gbs(row: dict[str, Any]) -> float | None:
    """What each device sends in a layer's collectives, by their time without waits."""
    us = sum(each["count"] * each["us"] for each in _exchanged(row))
    return sum(each["count"] * each["us"] * each["gbs"] for each in _exchanged(row)) / us if us else None


def of_alone(row: dict[str, Any], result: dict[str, Any]) -> float | None:
    """The time that a layer's collectives take alone over what they take in it; of those whose size was measured alone."""
    both = [
        (each["count"] * us, each["count"] * each["us"]) for each in _exchanged(row) if (us := _alone(each, result))
    ]
    return sum(alone for alone, _ in both) / sum(us for _, us in both) if both else None


def _alone(exchanged: dict[str, Any], result: dict[str, Any]) -> float | None:
    """Of a collective of that kind and size, or 2% off it: XLA may put a few numbers into the same one."""
    for link in result["links"]:
        if link["kind"] == exchanged["kind"] and abs(link["bytes"] - exchanged["bytes"]) < 0.02 * link["bytes"]:
            return link["us"]
    return None


def rate(row: dict[str, Any]) -> float:
    """Tokens a second of the whole model, or, where parts are not known, of the layers that ran."""
    return row.get("model_tokens_per_s", row["tokens_per_s"])


def ratios(result: dict[str, Any]) -> str:
    """Of tokens a second: EP over TP, data-parallel attention or not, and of each mode over one device's times their number."""
    lines = [
        f"{'':34}{'EP / TP':>9}{'with DP':>9}{'hybrid/TP':>10}{'with DP':>9}{'DP: TP':>9}{'DP: EP':>9}"
        f"{'scaling: EP':>13}{'EP+DP':>8}{'TP':>8}{'TP+DP':>8}"
    ]
    for case in dict.fromkeys(_case(row) for row in result["rows"]):
        rates = {
            row["mode"]: rate(row)
            for row in result["rows"]
            if _case(row) == case and row["variant"] == "default" and "failed" not in row
        }
        if ONE in rates:
            rates["ideal"] = rates[ONE] * result["devices"]
        over: Callable[[str, str], float | None] = lambda a, b, rates=rates: (  # noqa: E731
            rates[a] / rates[b] if a in rates and b in rates else None
        )
        quantize, phase, tokens, load = case
        pairs = [
            ("EP", "TP"),
            ("EP+DP", "TP+DP"),
            ("hybrid", "TP"),
            ("hybrid+DP", "TP+DP"),
            ("TP+DP", "TP"),
            ("EP+DP", "EP"),
        ]
        lines.append(
            f"{f'{quantize}, {phase} {tokens}, {load}':34}"
            + "".join(number(over(*pair), width, ".2f") for pair, width in zip(pairs, (9, 9, 10, 9, 9, 9), strict=True))
            + "".join(
                number(over(mode, "ideal"), width, ".0%")
                for mode, width in (("EP", 13), ("EP+DP", 8), ("TP", 8), ("TP+DP", 8))
            )
        )
    return "\n".join(lines) if len(lines) > 1 else ""


def variants(result: dict[str, Any]) -> str:
    """How many times as fast as the default build each other one is, by a step's time."""
    steps = {(_case(row), row["mode"], row["variant"]): row["step_us"] for row in result["rows"] if "failed" not in row}
    others = list(dict.fromkeys(variant for _, _, variant in steps if variant != "default"))
    if not others:
        return ""
    lines = [f"{'step time, default / this':46}" + "".join(f"{name:>16}" for name in others)]
    for case, mode in dict.fromkeys((case, mode) for case, mode, variant in steps if variant in others):
        default = steps.get((case, mode, "default"))
        quantize, phase, tokens, load = case
        line = f"{f'{quantize} {mode}, {phase} {tokens}, {load}':46}"
        for name in others:
            us = steps.get((case, mode, name))
            line += number(default / us if default and us else None, 16, ".3f")
        lines.append(line)
    return "\n".join(lines)


def checks(result: dict[str, Any]) -> str:
    """Logits on several devices against float32 on one."""
    if not result["check"]:
        return ""
    lines = [f"{'logits, error against float32 on one device':45}{'of one':>10}{'of all':>10}{'all - one':>11}"]
    for check in result["check"]:
        line = f"{check['format']} {check['mode']}, {check['processes']} process{'es' * (check['processes'] > 1)}"
        lines.append(
            f"{line:45}{check['failed']}"
            if "failed" in check
            else f"{line:45}{check['error_of_one']:10.1e}{check['error']:10.1e}{check['difference']:11.1e}"
            + ("" if check["right"] else "  WRONG")
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws, of the first load and for each format: tokens a second of each mode, and below where a layer's time goes.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    load = result["rows"][0]["load"]
    rows = [row for row in result["rows"] if (row["load"], row["variant"]) == (load, "default") and "failed" not in row]
    formats = list(dict.fromkeys(row["quantize"] for row in rows))
    cases = list(dict.fromkeys((row["phase"], row["tokens"]) for row in rows))
    height, width = 2 * len(formats), len(cases)
    figure, panels = pyplot.subplots(
        height, width, figsize=(3.2 * width + 1.5, 3.3 * height + 0.5), layout="constrained", squeeze=False
    )
    colors = dict(zip(PARTS, pyplot.colormaps["tab20"].colors, strict=False))
    for at, quantize in enumerate(formats):
        for (phase, tokens), (above, below) in zip(cases, panels[2 * at : 2 * at + 2].T, strict=True):
            shown = [row for row in rows if (row["quantize"], row["phase"], row["tokens"]) == (quantize, phase, tokens)]
            names = [row["mode"] for row in shown]
            if not shown:
                above.set_axis_off()
                below.set_axis_off()
                continue
            above.bar(
                names, [rate(row) for row in shown], color=["0.6" if name == ONE else "tab:blue" for name in names]
            )
            above.set_title(f"{quantize}, {phase} {tokens}", fontsize=10)
            bottoms = [0.0] * len(shown)
            for part in PARTS:
                heights = [row.get("parts", {}).get(part, 0.0) for row in shown]
                below.bar(names, heights, bottom=bottoms, color=colors[part], label=_SHORT.get(part, part))
                bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
            for axes in (above, below):
                axes.tick_params(axis="x", labelrotation=60, labelsize=8)
                axes.tick_params(axis="y", labelsize=8)
        panels[2 * at][0].set_ylabel(f"tokens/s, {result['model_layers']} layers (extrapolated)", fontsize=9)
        panels[2 * at + 1][0].set_ylabel("a layer with experts, us", fontsize=9)
    handles, labels = panels[1][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8)
    figure.suptitle(
        f"{result['model']}, {result['layers']} layers run, {load} load, {result['devices']} x {result['device']}; "
        f"one device has 1/{result['devices']} of the tokens",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
