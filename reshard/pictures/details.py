"""What a cell of a picture says when it is pointed at: its files, and its part of a parameter."""

from collections.abc import Sequence

from reshard.geometry import Region
from reshard.layout import Layout
from reshard.pictures.bands import Band
from reshard.pictures.columns import Columns


class Details:
    """Files and regions of the cells of one layout, by band and column."""

    def __init__(self, layout: Layout, columns: Columns, bands: Sequence[Band]) -> None:
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._regions: dict[tuple[int, int], dict[Region, None]] = {}
        self._files: dict[tuple[int, int], list[str]] = {}
        for number, band in enumerate(bands):
            shapes = {layout.places[name][0].placement.shape for name in band.names}
            if len(shapes) == 1:
                self._shapes[number] = shapes.pop()
            # Those between lie alike, or lie between.
            for name in (band.names[0], band.names[-1]):
                for slot in layout.places[name]:
                    for shard, column in enumerate(columns.of(slot)):
                        place = number, column
                        self._files.setdefault(place, []).append(slot.file_of(shard))
                        held = self._regions.setdefault(place, {})
                        held |= dict.fromkeys(slot.placement.regions(shard))

    def files(self, band: int, column: int) -> tuple[str, ...]:
        """The first and the last file that hold any of a cell."""
        files = self._files.get((band, column), [])
        return tuple(dict.fromkeys(files[:1] + files[-1:]))

    def region(self, band: int, column: int) -> str:
        """The rows and columns of each parameter, or nothing where parameters differ."""
        found = self._regions.get((band, column))
        if not found or band not in self._shapes:
            return ""
        shape = self._shapes[band]
        low = tuple(map(min, zip(*(region.start for region in found), strict=True)))
        high = tuple(map(max, zip(*(region.stop for region in found), strict=True)))
        words = [
            f"{word} {start:,} to {stop - 1:,}" if (start, stop) != (0, size) else f"all {word}"
            for word, start, stop, size in zip(_words(len(shape)), low, high, shape, strict=True)
        ]
        size = " x ".join(f"{extent:,}" for extent in shape)
        parts = f" in {len(found):,} boxes" if len(found) > 1 else ""
        return f"{', '.join(words)} of {size}{parts}"


def _words(dims: int) -> list[str]:
    return ["rows", "columns", *(f"dim {dim}" for dim in range(2, dims))][:dims]
