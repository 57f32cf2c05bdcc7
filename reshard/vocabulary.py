"""Padding of the vocabulary: tables with more rows than the model has tokens.

A target is laid out for the padded model, a source for what its files hold. Then the slots of the
embedding and the output are given the true rows alone, which are the first ones of what is stored:
the others belong to no parameter. Nothing here knows a format.
"""

from collections.abc import Sequence
from dataclasses import replace

from reshard.errors import LayoutError
from reshard.families import Model
from reshard.families.carried import CarriedConfig
from reshard.layout import Layout, Parameter, Slot

ROLES = ("embedding", "output")


def rows_of(model: Model, parameters: Sequence[Parameter], what: str) -> int:
    """The rows of a model's embedding and output; `what` asks for it, for messages.

    A family that is not known may have other tables: one with as many rows is refused.
    """
    tables = {parameter.shape[0] for parameter in parameters if parameter.role in ROLES}
    if len(tables) != 1 or not model.vocab:
        found = " and ".join(map(str, sorted(tables))) or "no"
        raise LayoutError(
            f"{what}: the tables of this {model.model_type} have {found} rows, expected those of "
            f"one vocabulary; leave {what} out"
        )
    rows = tables.pop()
    if isinstance(model, CarriedConfig):
        for parameter in parameters:
            if parameter.role not in ROLES and parameter.shape[:1] == (rows,):
                raise LayoutError(
                    f"{what}: `{parameter.name}` has {rows} rows too, and nothing says whether "
                    f"they are tokens (the model type {model.model_type} is not known); "
                    f"leave {what} out"
                )
    return rows


def resized(
    model: Model, parameters: Sequence[Parameter], rows: int
) -> tuple[Model, tuple[Parameter, ...]]:
    """A model and its parameters with another number of rows in the vocabulary's tables."""
    if isinstance(model, CarriedConfig):
        model = model.with_vocab(rows)
    else:
        model = replace(model, vocab=rows)
    return model, tuple(
        replace(parameter, shape=(rows, *parameter.shape[1:]))
        if parameter.role in ROLES
        else parameter
        for parameter in parameters
    )


def trimmed(layout: Layout, parameters: Sequence[Parameter]) -> Layout:
    """A layout of the same stored tensors that holds `parameters`, whose tables are shorter."""
    shapes = {item.name: item.shape for item in parameters if item.role in ROLES}
    slots = (_trimmed(slot, shapes.get(slot.parameter)) for slot in layout.slots)
    return replace(layout, slots=tuple(slots))


def _trimmed(slot: Slot, shape: tuple[int, ...] | None) -> Slot:
    """A slot whose parameter is the first rows of what it stores; the rest is padding."""
    placement = slot.placement
    if shape is None or shape == placement.shape:
        return slot
    stored = placement.whole or placement.shape
    held = replace(placement, shape=shape, whole=None if shape == stored else stored)
    return replace(slot, placement=held)


def stored_rows(layout: Layout, parameters: Sequence[Parameter]) -> int:
    """The rows of the vocabulary's tables as the files hold them, padding included."""
    names = {parameter.name for parameter in parameters if parameter.role in ROLES}
    placements = (slot.placement for slot in layout.slots if slot.parameter in names)
    return min((placement.whole or placement.shape)[0] for placement in placements)
