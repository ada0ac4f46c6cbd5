"""The states of a sweep: tensors that can be merged in any order.

A state is a frozen dataclass of tensors (and tuples of tensors) with `merge`. A batch is reduced
to a state of its own and merged in; so are the sweeps of several processes, and a sweep that was
interrupted with its continuation. Files are safetensors: reading one runs no code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from camdistill.errors import UserError
from camdistill.store.atomic_files import write_atomically

Me = TypeVar("Me")


@runtime_checkable
class State(Protocol):
    """What was seen."""

    def merge(self: Me, other: Me) -> Me:
        """Of both; associative, and commutative but for the order of float additions."""
        ...


AnyState = TypeVar("AnyState", bound=State)


@dataclass(frozen=True)
class ImageCounts:
    """How much went in.

    Attributes:
        images: Number of images given, also those with values that are not finite.
        batches: In as many calls.
    """

    images: Int[Tensor, ""]
    batches: Int[Tensor, ""]

    @classmethod
    def of(cls, images: int) -> "ImageCounts":
        """Of a batch."""
        return cls(torch.tensor(images), torch.tensor(1))

    @classmethod
    def empty(cls) -> "ImageCounts":
        """Of nothing."""
        return cls(zero_counts(), zero_counts())

    def merge(self, other: "ImageCounts") -> "ImageCounts":
        """Of both."""
        return ImageCounts(self.images + other.images, self.batches + other.batches)


def to_tensors(state: State) -> dict[str, Tensor]:
    """A state's tensors by name; the parts of a tuple are "name.0", "name.1"."""
    tensors: dict[str, Tensor] = {}
    for name in _field_names(type(state)):
        value = getattr(state, name)
        named_parts = {name: value} if isinstance(value, Tensor) else _number_parts(name, value)
        tensors |= named_parts
    return tensors


def from_tensors(kind: type[AnyState], tensors: Mapping[str, Tensor]) -> AnyState:
    """The state that `to_tensors` took apart."""
    values: dict[str, object] = {}
    for name in _field_names(kind):
        if name in tensors:
            values[name] = tensors[name]
        else:
            count = sum(key.startswith(f"{name}.") for key in tensors)
            values[name] = tuple(tensors[f"{name}.{place}"] for place in range(count))
    return kind(**values)


def byte_size(state: State) -> int:
    """Bytes of a state's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in to_tensors(state).values())


def save_sweep_state(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Writes a `state_dict` of a sweep, whole or not at all.

    Raises:
        UserError: If it can't be written.
    """
    write_atomically(path, save({name: value.contiguous() for name, value in tensors.items()}))
    return path


def load_sweep_state(path: Path) -> dict[str, Tensor]:
    """Reads what `save_sweep_state` wrote.

    Raises:
        UserError: If there is no such file, or it is damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"no sweep at {path}; start one without it") from None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is no sweep, or was cut short ({error}); delete it and sweep again"
        ) from None


def _field_names(kind: type[State]) -> list[str]:
    # A protocol can't say that its members are dataclasses.
    return [field.name for field in fields(kind)]  # type: ignore[arg-type]


def _number_parts(name: str, values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"{name}.{place}": value for place, value in enumerate(values)}


def zeros(*shape: int) -> Tensor:
    """What sums of floats begin with."""
    return torch.zeros(shape, dtype=torch.float64)


def zero_counts(*shape: int) -> Tensor:
    """What counts begin with."""
    return torch.zeros(shape, dtype=torch.int64)
