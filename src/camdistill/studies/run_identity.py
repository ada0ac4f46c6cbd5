"""What a run is: its model, its data and its seed; how two configs differ in these."""

from collections.abc import Mapping

# Options that change no number of a run.
FREE = {"model.cache_dir", "data.cache_dir", "data.download"}
# Where files lie: what is in them is compared with the checkpoint when it is loaded.
PLACES = {"model.teacher.weights", "data.root"}

Config = Mapping[str, object]


def differences(stored: Config, own: Config, free: set[str]) -> dict[str, tuple[object, object]]:
    """Options that make two configs two runs, with their values there and here."""
    found: dict[str, tuple[object, object]] = {}
    for part in ("model", "data", "seed_everything"):
        found |= _compare(part, stored.get(part), own.get(part))
    return {name: values for name, values in found.items() if name not in free}


def _compare(
    name: str, there: object, here: object, *, signature: bool = False
) -> dict[str, tuple[object, object]]:
    """Differing options by dotted name, without `init_args`.

    Args:
        name: Of the option, or of the group.
        there: Its value in one config.
        here: Its value in the other.
        signature: Whether the values are a class's options: one that only one config has is of
            another release, and its default is meant.
    """
    if not (isinstance(there, Mapping) and isinstance(here, Mapping)):
        return {} if there == here else {name: (there, here)}
    if there.get("class_path") != here.get("class_path"):
        return {f"{name}.class_path": (there.get("class_path"), here.get("class_path"))}
    found: dict[str, tuple[object, object]] = {}
    for key in dict.fromkeys((*there, *here)):
        if signature and not (key in there and key in here):
            continue
        inner = name if key == "init_args" else f"{name}.{key}"
        found |= _compare(inner, there.get(key), here.get(key), signature=key == "init_args")
    return found


def describe(differing: Mapping[str, tuple[object, object]]) -> str:
    """`has model.beta 3.0 (here 1.0)`, of the first few options that differ."""
    shown = [
        f"{name} {_short(there)} (here {_short(here)})"
        for name, (there, here) in list(differing.items())[:3]
    ]
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    networks = ("model.student", "model.network")
    kind = (
        "is of another network:" if any(name.startswith(networks) for name in differing) else "has"
    )
    return f"{kind} {', '.join(shown)}{more}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
