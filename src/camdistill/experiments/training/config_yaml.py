"""Reads a config's YAML after checking how large it would become."""

from collections import Counter
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from camdistill.errors import UserError

MAX_FILE_BYTES = 10_000_000  # bytes: a config has hundreds
MAX_VALUES = 100_000  # with everything that its aliases stand for


def load_config(path: Path) -> object:
    """What a YAML file says.

    Raises:
        UserError: It says an option twice, or its aliases stand for more than a config can hold.
        yaml.YAMLError, UnicodeDecodeError, OSError: It is not YAML, not text, or can't be read.
    """
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise UserError(f"{path} has {size:,} bytes; a config has at most {MAX_FILE_BYTES:,}")
    text = path.read_text(encoding="utf-8")
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is not None:
            _count_values(tree, path, {}, set())
        return yaml.safe_load(text)
    except RecursionError:
        raise UserError(
            f"{path} has lists inside lists, too deep to be read; check its brackets"
        ) from None
    except (UserError, UnicodeDecodeError):  # ValueErrors too
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise yaml.YAMLError(str(error)) from error


def _count_values(node: Node, path: Path, counts: dict[int, int], ancestors: set[int]) -> int:
    """How many values a node stands for, everything that aliases repeat counted each time."""
    if id(node) in ancestors:
        raise UserError(
            f"{path}, line {node.start_mark.line + 1}: the alias contains itself; write it out"
        )
    if id(node) in counts:
        return counts[id(node)]
    ancestors.add(id(node))
    children: list[Node] = []
    if isinstance(node, SequenceNode):
        children = list(node.value)
    elif isinstance(node, MappingNode):
        _check_keys_once(node, path)
        children = [part for pair in node.value for part in pair]
    counts[id(node)] = 1 + sum(_count_values(part, path, counts, ancestors) for part in children)
    ancestors.discard(id(node))
    if counts[id(node)] > MAX_VALUES:
        raise UserError(
            f"{path}, line {node.start_mark.line + 1}: its aliases (*name) stand for more than "
            f"{MAX_VALUES:,} values; write out what is meant"
        )
    return counts[id(node)]


def _check_keys_once(node: MappingNode, path: Path) -> None:
    """Of a name that is given twice YAML would keep the second, without a word."""
    names = [key for key, _ in node.value if isinstance(key, ScalarNode) and key.value != "<<"]
    counts = Counter(key.value for key in names)
    for key in reversed(names):
        if counts[key.value] > 1:
            raise UserError(
                f"{path}, line {key.start_mark.line + 1}: '{key.value}' is given twice; keep one"
            )
