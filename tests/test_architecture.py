"""The house as drawn in the README: rows, rooms, and who may do what."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "camdistill"
ROWS = [
    {"types", "errors", "tags"},
    {"files"},
    {"data", "networks", "perturb"},
    {"explain"},
    {"layers", "measure"},
    {"distill"},
    {"report"},
    {"studies"},
    {"commands"},
    {"cli"},
    {"__main__", "__init__"},
]
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
