"""The page of an analysis: findings, what was measured, and what each card means."""

from collections.abc import Collection, Mapping, Sequence

from camdistill import tags
from camdistill.layers.analysis import Analysis
from camdistill.layers.sweep.sweep_summary import LayerSummary


def findings_page(analysis: Analysis) -> str:
    """What stands out, the most serious first, and what the reader must know."""
    count = f"{analysis.sweep.images:,} images of {analysis.data}"
    lines = [f"## What stands out ({count})", ""]
    healthy = (
        "Nothing: no value that is not finite, no dead, duplicated or saturated units beyond what"
        " healthy networks have, no layer whose rank collapsed"
    )
    if len(analysis.sweep.networks) == 2:
        healthy += " or that has no like in the teacher"
    lines += [f"- **{finding.kind}** — {finding.text}" for finding in analysis.findings] or [
        f"{healthy}."
    ]
    if analysis.unfinished:
        lines += ["", f"**This report is partial: {analysis.unfinished}.**"]
    notes = [f"- {note}" for note in analysis.sweep.notes]
    notes += [f"- {name}: {used:,} images" for name, used in analysis.sweep.used.items()]
    return "\n".join([*lines, "", "## What the numbers are of", "", *notes])


def layers_page(analysis: Analysis) -> str:
    """A table of each network's layers."""
    parts = []
    for network, layers in analysis.sweep.networks.items():
        parts += [f"## {network}", "", _HEAD, _RULE, *(_layer_row(layer) for layer in layers), ""]
    return "\n".join(parts)


_HEAD = (
    "| layer | units | grid | active | dead | nearly | always on | population sparsity"
    " | effective rank |"
)
_RULE = "|---|---|---|---|---|---|---|---|---|"


def _layer_row(layer: LayerSummary) -> str:
    units, rank = layer.units, layer.rank
    cells = [layer.name, str(layer.channels), f"{layer.shape[1]}x{layer.shape[2]}"]
    if layer.all_nonfinite:
        return f"| {' | '.join([*cells, '**no image is finite here**', *5 * ['–']])} |"
    cells += [
        f"{100 * float(units.active.double().mean()):.1f} %",
        _count_and_units(units.dead),
        _count_and_units(units.nearly_dead),
        _count_and_units(units.always_on),
        f"{layer.sparsity.population:.2f}",
        f"{rank.effective:.1f} of {rank.possible}",
    ]
    return f"| {' | '.join(cells)} |"


def _count_and_units(units: Sequence[int], max_units: int = 8) -> str:
    """How many, and which."""
    if not units:
        return "0"
    named = ", ".join(map(str, units[:max_units])) + (", ..." if len(units) > max_units else "")
    return f"{len(units)} ({named})"


def report_page(
    analysis: Analysis, pictures: Mapping[str, Sequence[str]], cards: Collection[str]
) -> str:
    """The whole report as one Markdown file beside its pictures.

    Args:
        analysis: The analysis.
        pictures: Files relative to the page, by tag.
        cards: Tags of all that TensorBoard has.
    """
    parts = ["# What the layers do", "", findings_page(analysis), "", layers_page(analysis)]
    for tag, files in pictures.items():
        parts += [f"## {tags.short(tag).replace('_', ' ')}", "", tags.describe_card(tag), ""]
        parts += [f"![{tags.short(tag)}]({file})" for file in files]
        parts.append("")
    return "\n".join([*parts, "## Every card", "", tags.how_to_read(cards=cards), ""])
