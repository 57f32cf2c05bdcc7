"""Pictures of a plan: one page that shows it."""

from reshard.pictures.facts import Memory
from reshard.pictures.figures import figures_of
from reshard.pictures.page import page

__all__ = ["Memory", "figures_of", "page"]
