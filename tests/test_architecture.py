"""The house as drawn in the README: rows, rooms, and who may do what."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "camdistill"
# Rooms from the ground up: a module imports from rows above its own, and inside its own room.
ROWS = [
    {"types", "errors", "tags"},
    {"store"},
    {"data", "networks", "perturb"},
    {"explain"},
    {"measure", "layers"},
    {"distill"},
    {"report"},
    {"experiments"},
    {"claims"},
    {"commands"},
    {"cli"},
    {"__main__", "__init__"},
]
# The same inside a room; modules that lie in no inner room come last.
INNER_ROWS = {
    "explain": [{"engine"}],
    "layers": [{"sweep"}, {"units"}],
    "experiments": [
        {"shared"},
        {"training", "evaluation", "ranking"},
        {"refinement", "adaptation", "learned_metric"},
    ],
}
# Of the row above, these inner rooms know no others.
MAY_IMPORT = {
    "training": {"shared"},
    "evaluation": {"shared"},
    "ranking": {"shared"},
    "refinement": {"shared", "ranking"},
    "adaptation": {"shared", "ranking", "evaluation"},
    "learned_metric": {"shared", "ranking", "evaluation"},
}
LARGEST_FOLDER = 25  # modules
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
MODULES = sorted(SOURCE.rglob("*.py"))


def room_of(module: Path) -> str:
    parts = module.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else module.stem


def imported(module: Path) -> set[str]:
    """Full names that a module imports, function-level imports included."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_module_imports_only_from_rows_above(module: Path) -> None:
    room = room_of(module)
    assert room in ROW_OF, f"room {room!r} is not in the drawing"
    for name in imported(module):
        parts = name.split(".")
        if parts[0] != "camdistill" or len(parts) < 2 or parts[1] == room:
            continue
        assert parts[1] in ROW_OF, f"{module}: imports {name} through the package's front door"
        assert ROW_OF[parts[1]] < ROW_OF[room], f"{module}: {room} may not import {name}"


def _inner_room(room: str, name: str) -> str:
    """The inner room in which a dotted name below a room lies; empty for none."""
    first = name.split(".")[0]
    return first if any(first in rooms for rooms in INNER_ROWS[room]) else ""


@pytest.mark.parametrize("room", INNER_ROWS)
def test_inner_rooms_are_rows_too(room: str) -> None:
    rows = {inner: row for row, rooms in enumerate(INNER_ROWS[room]) for inner in rooms}
    for module in (SOURCE / room).rglob("*.py"):
        inside = ".".join(module.relative_to(SOURCE / room).with_suffix("").parts)
        inner = _inner_room(room, inside)
        for name in imported(module):
            if not name.startswith(f"camdistill.{room}."):
                continue
            other = _inner_room(room, name.removeprefix(f"camdistill.{room}."))
            if other == inner:
                continue
            assert not inner or (other and rows[other] < rows[inner]), f"{module} imports {name}"
            assert other in MAY_IMPORT.get(inner, {other}), f"{module} imports {name}"


def test_only_commands_imports_claims() -> None:
    users = {room_of(path) for path in MODULES if "camdistill.claims" in path.read_text()}
    assert users <= {"claims", "commands"}


def test_readme_draws_the_same_house() -> None:
    readme = (SOURCE.parents[1] / "README.md").read_text()
    drawing = re.search(r"```\n(types errors tags .*?)```", readme, re.DOTALL)
    assert drawing is not None
    drawn = [line for line in drawing[1].splitlines() if not line.startswith(" ")]
    names = [re.split(r"  +", line)[0].split() for line in drawn]
    order = [room for group in names for room in group]
    assert set(order) == set(ROW_OF) - {"__main__", "__init__"}
    assert [ROW_OF[room] for room in order] == sorted(ROW_OF[room] for room in order)
    inner = set(re.findall(r"^  (\w+)", drawing[1], re.MULTILINE))
    assert inner == {name for rows in INNER_ROWS.values() for rooms in rows for name in rooms}


def test_no_folder_is_a_hall() -> None:
    for folder in {path.parent for path in MODULES}:
        assert len(list(folder.glob("*.py"))) <= LARGEST_FOLDER, folder


def _modules_with(*needles: str) -> set[str]:
    return {
        str(path.relative_to(SOURCE))
        for path in MODULES
        if any(needle in path.read_text() for needle in needles)
    }


def test_only_capture_sets_hooks() -> None:
    assert _modules_with("register_forward", "register_full_", "register_module_") <= {
        "networks/capture.py"
    }


def test_only_figures_imports_matplotlib() -> None:
    users = {
        str(path.relative_to(SOURCE))
        for path in MODULES
        if any(name.split(".")[0] == "matplotlib" for name in imported(path))
    }
    assert all(user.startswith("report/figures/") for user in users), users


def test_only_tensorboard_writes_events() -> None:
    assert _modules_with("SummaryWriter", ".add_image", ".add_histogram", ".add_text(") <= {
        "report/tensorboard.py"
    }


def test_only_commands_print() -> None:
    printing = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                printing.add(room_of(path))
    assert printing <= {"commands", "cli"}


def test_every_torch_load_is_weights_only() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_nothing_unpickles() -> None:
    unsafe = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for path in MODULES:
        assert not {name.split(".")[0] for name in imported(path)} & unsafe, path


# Names of other libraries and papers that docstrings mention and no code of ours uses.
FOREIGN_NAMES = {
    *("Resize", "CenterCrop", "at_loss", "purge_step", "hp_metric", "version_3"),
    *("KLDivLoss", "DataLoader"),
}


def words_of_code(path: Path) -> set[str]:
    """Names in a module's code, and words of its strings that are no docstrings."""
    words = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            words.add(token.string)
        elif token.type == tokenize.STRING and not token.string.lstrip("rfb").startswith('"""'):
            words |= set(re.findall(r"\w+", token.string))
    return words


def module_of(name: str) -> bool:
    """Whether the folders at the start of a dotted name go on to a module, or to a name in one."""
    place, *rest = SOURCE, *name.removeprefix("camdistill.").split(".")
    for index, part in enumerate(rest):
        if (place / f"{part}.py").is_file():
            return True
        if not (place / part).is_dir():
            front = (place / "__init__.py").read_text()
            return index == 0 or re.search(rf"\b{part}\b", front) is not None
        place /= part
    return True


def test_names_in_backticks_exist() -> None:
    """A docstring that a renaming has left behind sends its reader to nothing."""
    words = set().union(*(words_of_code(path) for path in MODULES)) | FOREIGN_NAMES
    words |= {part for path in MODULES for part in path.relative_to(SOURCE).with_suffix("").parts}
    configs = SOURCE.parents[1] / "configs"
    words |= {word for path in configs.iterdir() for word in re.findall(r"\w+", path.read_text())}
    words |= {"camdistill", "json", "csv", "txt", "yaml", "md", "log", "pt2", "safetensors", "npz"}
    stale = [
        f"{path.relative_to(SOURCE)}: `{name}`"
        for path in MODULES
        for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", path.read_text())
        if not set(name.split(".")) <= words or not module_of(name)
    ]
    assert not stale, stale
