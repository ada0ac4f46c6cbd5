"""A config's YAML, read after a look at how large it would become."""

from collections import Counter
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from camdistill.errors import UserError

LONGEST_FILE = 10_000_000  # bytes: a config has hundreds
MOST_VALUES = 100_000  # with everything that its aliases stand for


def load_config(path: Path) -> object:
    """What a YAML file says.

    Raises:
        UserError: It says an option twice, or its aliases stand for more than a config can hold.
        yaml.YAMLError, UnicodeDecodeError, OSError: It is not YAML, not text, or can't be read.
    """
    if (size := path.stat().st_size) > LONGEST_FILE:
        raise UserError(f"{path} has {size:,} bytes; a config has at most {LONGEST_FILE:,}")
    text = path.read_text(encoding="utf-8")
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is not None:
            _count(tree, path, {}, set())
        return yaml.safe_load(text)
    except RecursionError:
        raise UserError(
            f"{path} has lists inside lists, too deep to be read; check its brackets"
        ) from None
    except (UserError, UnicodeDecodeError):  # ValueErrors too
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise yaml.YAMLError(str(error)) from error


def _count(node: Node, path: Path, known: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for, everything that aliases repeat counted each time."""
    if id(node) in above:
        raise UserError(
            f"{path}, line {node.start_mark.line + 1}: the alias contains itself; write it out"
        )
    if id(node) in known:
        return known[id(node)]
    above.add(id(node))
    inside: list[Node] = []
    if isinstance(node, SequenceNode):
        inside = list(node.value)
    elif isinstance(node, MappingNode):
        _check_each_once(node, path)
        inside = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_count(part, path, known, above) for part in inside)
    above.discard(id(node))
    if known[id(node)] > MOST_VALUES:
        raise UserError(
            f"{path}, line {node.start_mark.line + 1}: its aliases (*name) stand for more than "
            f"{MOST_VALUES:,} values; write out what is meant"
        )
    return known[id(node)]


def _check_each_once(node: MappingNode, path: Path) -> None:
    """Of a name that is given twice YAML would keep the second, without a word."""
    names = [key for key, _ in node.value if isinstance(key, ScalarNode) and key.value != "<<"]
    counts = Counter(key.value for key in names)
    for key in reversed(names):
        if counts[key.value] > 1:
            raise UserError(
                f"{path}, line {key.start_mark.line + 1}: '{key.value}' is given twice; keep one"
            )
