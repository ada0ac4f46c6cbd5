"""What each card means: one of them, or the page that explains all."""

from collections.abc import Collection

from camdistill.tags.groups import MAPS, MEANINGS, MEANINGS_OF_LAYERS, TEST


def on_test(tag: str) -> str:
    """The same quantity measured on test images: `1_overview/loss_val` gives `9_test/loss`."""
    return f"{TEST}/{short(tag).removesuffix('_val')}"


def short(tag: str) -> str:
    """The tag without its group: `loss_val`."""
    return tag.partition("/")[2]


def describe_card(tag: str) -> str:
    """What the card means, in Markdown; empty for a tag that isn't ours."""
    if tag in MEANINGS:
        return MEANINGS[tag]
    if tag.startswith(f"{TEST}/"):
        twin = next((known for known in MEANINGS if on_test(known) == tag), None)
        twin = twin or f"{MAPS}/{short(tag)}"
        return f"On test images: {meaning}" if (meaning := describe_card(twin)) else ""
    stem = _stem_of(tag)
    return "" if stem is None else f"Layer {tag.removeprefix(stem)}. {MEANINGS_OF_LAYERS[stem]}"


def _stem_of(tag: str) -> str | None:
    """What the layer's name follows in a tag of one layer."""
    return next((stem for stem in MEANINGS_OF_LAYERS if tag.startswith(stem)), None)


def how_to_read(groups: Collection[str] = (), cards: Collection[str] | None = None) -> str:
    """A Markdown page that says what each card means; of some groups, or of all.

    Args:
        groups: Which; empty for all.
        cards: Tags that were written, where no others shall be told.
    """
    meanings = MEANINGS | {f"{stem}<layer>": text for stem, text in MEANINGS_OF_LAYERS.items()}
    if cards is not None:
        written_names = {tag if tag in MEANINGS else f"{_stem_of(tag)}<layer>" for tag in cards}
        meanings = {tag: text for tag, text in meanings.items() if tag in written_names}
    rows = [
        f"| `{tag}` | {text} |"
        for tag, text in meanings.items()
        if not groups or tag.partition("/")[0] in groups
    ]
    words = "A **map** says where in the image a network finds evidence for a class (Grad-CAM)."
    if any("student" in row for row in rows):
        words += " The **student** learns to classify like the **teacher** and to have its maps."
    smoothing_note = (
        "Charts are smoothed by 0.6 unless told otherwise: set *Smoothing* to 0 to see what was"
        " measured."
    )
    if cards is None or any(card.startswith(f"{TEST}/") for card in cards):
        smoothing_note += f" `{TEST}/...` are the same quantities on test images."
    return "\n".join(
        [
            words,
            "",
            "| card | meaning |",
            "|---|---|",
            *sorted(rows),
            "",
            smoothing_note,
        ]
    )
