"""Chapters about the results of ``mhr evaluate`` and ``mhr analyze`` for one model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hyperrouter.report.figures import Drawing, Line, heat, lines
from megatron_hyperrouter.report.page import Section

MEASURES = (
    ("entropy", "entropy, nats", ".3f"),
    ("logit_std", "logit std", ".3f"),
    ("mutual_information", "mutual information, nats", ".3f"),
    ("load_max_over_mean", "largest load / mean", ".2f"),
    ("effective_experts", "effective experts / all", ".2f"),
    ("dead_experts", "dead experts", ".0f"),
    ("mean_similarity", "mean similarity", ".3f"),
    ("largest_similarity", "largest similarity", ".3f"),
)
MEASURES_NOTE = (
    "Entropy: the entropy of the softmax of a token's logits over all experts. Logit std: the standard "
    "deviation of a token's logits. Mutual information: the mutual information between token and "
    "expert, which is 0 if the router scores are the same for every token. Load: number of tokens that "
    "an expert gets. Effective experts: exp of the entropy of the loads (all experts if the loads are "
    "equal). Dead experts: number of experts with less than 5 % of the mean load. Similarity: linear "
    "CKA between the outputs of two experts, mean and largest value over all pairs."
)
JACOBIAN = (
    ("share", "share of J_R in J", ".3f"),
    ("effective_rank", "effective rank of J_R", ".1f"),
    ("drift", "drift of the span", ".4f"),
    ("inputs_in_span", "inputs in span", ".3f"),
    ("inputs_by_chance", "inputs in span, by chance", ".3f"),
)


def quality_chapter(found: Mapping[str, Mapping[str, Any]], drawing: Drawing, title: str) -> Section:
    """The scores of models at each k."""
    section = Section(title)
    rows = [
        [
            name,
            row["topk"],
            cell(row["lm_loss"], ".4f"),
            cell(row.get("perplexity"), ".2f"),
            cell(row.get("bits_per_byte"), ".4f"),
            cell(content.get("word_perplexity", {}).get(str(row["topk"])), ".2f"),
        ]
        for name, content in found.items()
        for row in content["results"]
    ]
    heads = ["model", "k", "nats per token", "perplexity per token", "bits per byte", "perplexity per word"]
    section.table(heads, rows, name="quality", note="Scores of each model with k active experts per token.")

    def fill(axes: Any) -> None:
        series = {}
        for name, content in found.items():
            ordered = sorted(content["results"], key=lambda row: row["topk"])
            losses = [math.nan if row["lm_loss"] is None else row["lm_loss"] for row in ordered]
            series[name] = Line([row["topk"] for row in ordered], losses, marker="o")
        lines(axes, series, xlabel="active experts k", ylabel="loss, nats per token", log_x=True)

    section.figure(drawing.draw(fill), "Loss at each k. All points of a line have the same weights.")
    return section


def analysis_chapters(content: Mapping[str, Any], drawing: Drawing, title: str = "") -> list[Section]:
    """Router measures, loads, similarity, Jacobian, and routes over the checkpoints, of one model."""
    measures, alike = Section(f"Routing on evaluation data{title}"), Section(f"Similarity of experts{title}")
    results = content["results"]
    shown = [
        (key, head, form)
        for key, head, form in MEASURES
        if any(row.get(key) is not None for result in results for row in result["layers"])
    ]
    rows = [
        [result["topk"], row["layer"], *(cell(row.get(key), form) for key, _, form in shown)]
        for result in results
        for row in result["layers"]
    ]
    measures.table(["k", "layer", *(head for _, head, _ in shown)], rows, name="routing", note=MEASURES_NOTE)
    last = results[-1]
    measures.figure(
        loads_figure({f"k = {last['topk']}": last["layers"]}, drawing),
        "Load of each expert divided by the mean load, sorted within each layer (1: equal loads).",
    )
    alike.figure(
        similarity_figure({f"k = {last['topk']}": last["layers"]}, drawing),
        similarity_caption(last["layers"]),
    )
    found = [measures, alike, jacobian_chapter(results, title)]
    if content.get("checkpoints") and len(content["checkpoints"]["steps"]) > 1:
        found.append(routes_chapter({"": content["checkpoints"]}, drawing, title))
    return found


def loads_figure(models: Mapping[str, Sequence[Mapping[str, Any]]], drawing: Drawing) -> str:
    """A heat map for each model: layers by experts."""

    def fill(axes: Any) -> None:
        for each, (name, layers) in zip(_flat(axes), models.items(), strict=False):
            matrix = [sorted(row["load"], reverse=True) for row in layers]
            image = heat(each, matrix, title=name, low=0.0, high=2.0, cmap="RdBu_r")
            each.set(xlabel="experts, sorted by load", ylabel="layer")
            each.set_xticks([])
            each.set_yticks(range(len(layers)), [str(row["layer"]) for row in layers])
            each.figure.colorbar(image, ax=each, extend="max")

    columns = min(len(models), 3)
    rows = -(-len(models) // columns)
    layers = max(len(layers) for layers in models.values())
    return drawing.draw(
        _hiding(fill, len(models)), size=(8.0, rows * min(1.2 + 0.25 * layers, 5.0)), grid=(rows, columns)
    )


def similarity_figure(models: Mapping[str, Sequence[Mapping[str, Any]]], drawing: Drawing) -> str:
    """The matrices of the first, the middle and the last layer, a row for each model."""
    chosen = {name: _ends(layers) for name, layers in models.items()}
    columns = max(len(layers) for layers in chosen.values())

    def fill(axes: Any) -> None:
        flat = _flat(axes)
        for row, (name, layers) in enumerate(chosen.items()):
            for column, layer in enumerate(layers):
                each = flat[row * columns + column]
                image = heat(
                    each, layer["similarity"], title=f"{name}, layer {layer['layer']}", low=0.0, high=1.0
                )
                each.set_aspect("equal")
                each.set(xticks=[], yticks=[])
        flat[0].figure.colorbar(image, ax=list(flat), label="linear CKA", shrink=0.7)

    return drawing.draw(fill, size=(8.0, 2.7 * len(chosen)), grid=(len(chosen), columns))


def similarity_caption(layers: Sequence[Mapping[str, Any]]) -> str:
    """What the matrices show."""
    means = [row["mean_similarity"] for row in layers if row["mean_similarity"] is not None]
    mean = f" Mean over all pairs and layers: {sum(means) / len(means):.3f}." if means else ""
    return (
        "Linear CKA between the outputs of two experts for the same tokens "
        f"(1: equal up to rotation and scale; near 0: unrelated).{mean}"
    )


def jacobian_chapter(results: Sequence[Mapping[str, Any]], title: str = "") -> Section:
    """What the router adds to the Jacobian, as a table."""
    section = Section(f"Router and Jacobian{title}")
    rows = [
        [result["topk"], row["layer"], *(cell(row["jacobian"].get(key), form) for key, _, form in JACOBIAN)]
        for result in results
        for row in result["layers"]
    ]
    section.table(
        ["k", "layer", *(head for _, head, _ in JACOBIAN)], rows, name="jacobian", note=JACOBIAN_NOTE
    )
    return section


JACOBIAN_NOTE = (
    "J is the Jacobian of an MoE layer, and J_R is the part of J that comes from the router. Share of "
    "J_R in J: |J_R|^2 / |J|^2, mean over tokens. Effective rank: exp of the entropy of the eigenvalues "
    "of the mean of J_R^T J_R. Span: the space that the rows of the router matrix span. Drift: share of "
    "the span that lies outside the span at the start of training (0: the router has not moved). Inputs "
    "in span: share of the variance of the layer's inputs that lies in the span. Inputs in span, by "
    "chance: the same share for a random span of the same dimension. At k = 1, J_R is 0 if the routing "
    "weights sum to 1, because the only weight is then constant. A router that is not a linear map has "
    "no span (-)."
)


def routes_chapter(models: Mapping[str, Mapping[str, Any]], drawing: Drawing, title: str = "") -> Section:
    """Saturation and fluctuation of the first and the last layer over the checkpoints."""
    section = Section(f"Routing over time{title}")

    def fill(axes: Any) -> None:
        kept: dict[str, Line] = {}
        moved: dict[str, Line] = {}
        for name, over in models.items():
            steps = over["steps"]
            for row in _ends(over["layers"]):
                label = f"{name} layer {row['layer']}".strip()
                kept[label] = Line(steps, row["saturation"], marker="o")
                moved[label] = Line(steps[1:], row["fluctuation"], marker="o")
        lines(axes[0], kept, xlabel="step", ylabel="saturation")
        lines(axes[1], moved, xlabel="step", ylabel="fluctuation", legend=False)
        ends = [row for over in models.values() for row in _ends(over["layers"])]
        for each, key in ((axes[0], "saturation_by_chance"), (axes[1], "fluctuation_by_chance")):
            each.axhline(
                sum(row[key] for row in ends) / len(ends), color="#7F7F7F", linestyle=":", linewidth=1
            )

    over = next(iter(models.values()))
    section.figure(
        drawing.draw(fill, size=(8.0, 3.0), grid=(1, 2)),
        f"How {over['tokens']:,} fixed tokens are routed with k = {over['topk']} at each checkpoint. "
        "Saturation: share of the chosen experts that the last checkpoint chooses, too. Fluctuation: "
        "share of tokens whose top-1 expert differs from their top-1 expert at the previous checkpoint. "
        "Dotted lines: values of random routing.",
    )
    return section


def cell(value: float | None, form: str) -> str:
    """A number of a table; a dash for none."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _ends(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    places = sorted({0, len(layers) // 2, len(layers) - 1} if len(layers) > 2 else {0, len(layers) - 1})
    return [layers[place] for place in places]


def _flat(axes: Any) -> list[Any]:
    return list(axes.flat) if hasattr(axes, "flat") else [axes]


def _hiding(fill: Any, used: int) -> Any:
    """As ``fill``, and axes beyond the first ``used`` are hidden."""

    def both(axes: Any) -> None:
        fill(axes)
        for empty in _flat(axes)[used:]:
            empty.set_visible(False)

    return both
