"""The figures as the page's script reads them: short keys, plain lists, names as text."""

import json
from collections.abc import Mapping, Sequence

from reshard.pictures.columns import Column
from reshard.pictures.figures import Figures, Side

Record = Mapping[str, object]


def record_of(figures: Figures, memory: Record, measured: Mapping[str, Sequence[int]]) -> Record:
    """All that is drawn; what of the ranks' bytes was `measured` instead of what was planned."""
    return {
        "world": figures.plan.world,
        "direct": figures.plan.exchange == "direct",
        "order": figures.order,
        "source": _side(figures.source),
        "target": _side(figures.target),
        "bands": _bands(figures),
        "shares": [[share.text, share.stripes] for share in figures.shares],
        "bins": [[ranks[0], ranks[-1]] for ranks in figures.bins],
        "matrix": [[*pair, *nbytes] for pair, nbytes in sorted(figures.matrix.items())],
        "loads": {
            "read": [load.read for load in figures.loads],
            "sent": [load.sent for load in figures.loads],
            "received": [load.received for load in figures.loads],
            "written": [load.written for load in figures.loads],
            **measured,
        },
        "measured": bool(measured),
        "memory": memory,
    }


def _bands(figures: Figures) -> Sequence[Record]:
    return [
        {
            "group": band.group,
            "label": band.label,
            "names": _ends(band.names),
            "count": len(band.names),
            "crossing": crossing,
            "needed": needed,
        }
        for band, (crossing, needed) in zip(figures.bands, figures.crossing, strict=True)
    ]


def _side(side: Side) -> Record:
    """Texts are listed once, and meant by their numbers: many cells share them."""
    regions: dict[str, int] = {}
    files: dict[tuple[str, ...], int] = {}
    cells = [
        [
            *(cell.band, cell.column, cell.nbytes, cell.share),
            files.setdefault(cell.files, len(files)),
            regions.setdefault(cell.region, len(regions)),
        ]
        for cell in side.cells
    ]
    columns = side.columns
    return {
        "name": side.layout.name,
        "unit": columns.unit,
        "units": columns.units,
        "count": len(side.layout.files),
        "columns": [_column(column) for column in columns.columns],
        "cells": cells,
        "files": list(files),
        "regions": list(regions),
    }


def _column(column: Column) -> Sequence[object]:
    return [column.label, _ends(column.files), len(column.files)]


def _ends(names: Sequence[str]) -> Sequence[str]:
    """The first and the last of many names, which stand for all."""
    return names if len(names) < 2 else (names[0], names[-1])


def script_text(record: Record) -> str:
    """JSON that may stand in a `script` element, whatever is in its names."""
    text = json.dumps(record, separators=(",", ":"), sort_keys=True)
    # Python escapes all beyond ASCII; these three could end the element or begin a comment.
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
