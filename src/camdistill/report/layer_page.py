"""An analysis in words: what stands out, what was measured of what, what each card means."""

from collections.abc import Collection, Mapping, Sequence

from camdistill import tags
from camdistill.layers.analysis import Analysis
from camdistill.layers.sweep.sweep_summary import LayerSummary


def findings_page(found: Analysis) -> str:
    """What stands out, the most serious first, and what the reader must know."""
    count = f"{found.sweep.images:,} images of {found.data}"
    lines = [f"## What stands out ({count})", ""]
    healthy = (
        "Nothing: no value that is not finite, no dead, duplicated or saturated units beyond what"
        " healthy networks have, no layer whose rank collapsed"
    )
    if len(found.sweep.networks) == 2:
        healthy += " or that has no like in the teacher"
    lines += [f"- **{one.kind}** — {one.text}" for one in found.findings] or [f"{healthy}."]
    if found.unfinished:
        lines += ["", f"**This report is partial: {found.unfinished}.**"]
    notes = [f"- {note}" for note in found.sweep.notes]
    notes += [f"- {name}: {used:,} images" for name, used in found.sweep.used.items()]
    return "\n".join([*lines, "", "## What the numbers are of", "", *notes])


def layers_page(found: Analysis) -> str:
    """A table of each network's layers."""
    parts = []
    for network, layers in found.sweep.networks.items():
        parts += [f"## {network}", "", _HEAD, _RULE, *(_row(layer) for layer in layers), ""]
    return "\n".join(parts)


_HEAD = (
    "| layer | units | grid | active | dead | nearly | always on | population sparsity"
    " | effective rank |"
)
_RULE = "|---|---|---|---|---|---|---|---|---|"


def _row(layer: LayerSummary) -> str:
    units, rank = layer.units, layer.rank
    cells = [layer.name, str(layer.channels), f"{layer.shape[1]}x{layer.shape[2]}"]
    if layer.lost:
        return f"| {' | '.join([*cells, '**no image is finite here**', *5 * ['–']])} |"
    cells += [
        f"{100 * float(units.active.double().mean()):.1f} %",
        _numbers(units.dead),
        _numbers(units.nearly_dead),
        _numbers(units.always_on),
        f"{layer.sparsity.population:.2f}",
        f"{rank.effective:.1f} of {rank.possible}",
    ]
    return f"| {' | '.join(cells)} |"


def _numbers(units: Sequence[int], most: int = 8) -> str:
    """How many, and which."""
    if not units:
        return "0"
    named = ", ".join(map(str, units[:most])) + (", ..." if len(units) > most else "")
    return f"{len(units)} ({named})"


def report_page(
    found: Analysis, pictures: Mapping[str, Sequence[str]], cards: Collection[str]
) -> str:
    """The whole report as one Markdown file beside its pictures.

    Args:
        found: The analysis.
        pictures: Files relative to the page, by tag.
        cards: Tags of all that TensorBoard has.
    """
    parts = ["# What the layers do", "", findings_page(found), "", layers_page(found)]
    for tag, files in pictures.items():
        parts += [f"## {tags.short(tag).replace('_', ' ')}", "", tags.describe_card(tag), ""]
        parts += [f"![{tags.short(tag)}]({file})" for file in files]
        parts.append("")
    return "\n".join([*parts, "## Every card", "", tags.how_to_read(cards=cards), ""])
