"""A format of its own: a safetensors file per parameter, and rotary rows interleaved.

config.json
embedding.safetensors            one tensor each, called `weight`
layers/0/attention.q.safetensors
...
"""

from reshard import families
from reshard.formats import common
from reshard.formats.options import Scan
from reshard.layout import Layout, Slot
from reshard.placement import Placement, uncut

NAME = "toy"


def layout(parameters, model, options):
    """Which file holds which box of which parameter: here, each file all of one."""
    return Layout(NAME, "safetensors", 1, tuple(map(_slot, parameters)))


def _slot(parameter):
    folder = "" if parameter.layer is None else f"layers/{parameter.layer}/"
    rows = parameter.head if parameter.rotary else 0
    placement = Placement(parameter.shape, uncut(parameter.shape[0]), interleaved=rows)
    file = f"{folder}{parameter.role}.safetensors"
    return Slot(parameter.name, placement, file, "weight", parameter.dtype)


def detect(path):
    """Whether a directory is of this format."""
    return (path / "embedding.safetensors").is_file()


def scan(path, options):
    """The model and the layout of a directory that exists."""
    model = common.read_config(path / common.CONFIG)
    parameters = tuple(families.parameters(model))
    return Scan(NAME, model, parameters, layout(parameters, model, options), path, options)


def side_files(model, layout, options):
    """config.json, which `scan` reads."""
    return common.config_files(model)
