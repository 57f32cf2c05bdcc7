"""What two checkpoints differ in, parameter by parameter, and what is said of it."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from reshard.errors import VerifyError, some
from reshard.geometry import whole
from reshard.layout import Slot
from reshard.plan import Plan
from reshard.values import Kind, Unequal, comparable, joined

HINT = "; --cast compares after B's dtype"


@dataclass(frozen=True, slots=True)
class Difference:
    """What of a parameter differs in a block, or in all of it; `index` is that of the first."""

    parameter: str
    index: tuple[int, ...]
    found: Unequal
    files: tuple[str, str]


@dataclass(slots=True)
class Findings:
    """What was found: differences by parameter, copies that must not differ, copies that may."""

    differences: dict[str, Difference] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    allowed: set[tuple[str, str]] = field(default_factory=set)

    def take(self, found: Difference) -> None:
        """Add a difference; of one parameter the first by index is kept, and all are counted."""
        known = self.differences.get(found.parameter)
        if known is not None:
            pair = sorted((known, found), key=lambda one: one.index)
            found = replace(pair[0], found=joined([one.found for one in pair]))
        self.differences[found.parameter] = found

    def add(self, more: "Findings") -> None:
        """Add what another rank found."""
        for found in more.differences.values():
            self.take(found)
        self.forbidden |= more.forbidden
        self.allowed |= more.allowed


def kind_of(slot: Slot) -> Kind:
    """How a slot stores the elements of its parameter."""
    return Kind(slot.dtype, slot.encoding)


def kinds_of(plan: Plan, parameter: str) -> tuple[Kind, Kind]:
    """How the two sides store a parameter."""
    return (kind_of(plan.source.places[parameter][0]), kind_of(plan.target.places[parameter][0]))


def raise_on(what: str, plan: Plan, findings: Findings, *, cast: bool) -> None:
    """A VerifyError that names the first differences and the number of all, if there are any."""
    texts, hint = [], ""
    for name in plan.names:
        kinds = kinds_of(plan, name)
        if name in findings.differences:
            texts.append(_text(plan, findings.differences[name]))
        elif not cast and not comparable(*kinds):
            texts.append(f"`{name}`: {kinds[0]} against {kinds[1]}")
        else:
            continue
        hint = HINT if kinds[0] != kinds[1] and not cast else hint
    count = f" {len(texts)} of {len(plan.names)} parameters differ:" if texts else ""
    texts += sorted(findings.forbidden)
    if texts:
        raise VerifyError(f"{what}:{count} {some(texts)}{hint}")


def _text(plan: Plan, difference: Difference) -> str:
    """Where a parameter differs first, and how much of it does."""
    found, files = difference.found, difference.files
    numel = whole(plan.source.places[difference.parameter][0].placement.shape).numel
    return (
        f"`{difference.parameter}{list(difference.index)}`: {found.values[0]} against "
        f"{found.values[1]} (`{files[0]}` against `{files[1]}`), {found.count:,} of {numel:,} "
        f"elements, by at most {found.largest:g}"
    )


def warning(copies: Collection[tuple[str, str]]) -> list[str]:
    """One line on copies that differ where they may, if there are any."""
    if not copies:
        return []
    key, file = min(copies)
    return [
        f"warning: {len(copies)} copies of replicated tensors differ from the first coordinate's, "
        f"which is compared; first `{key}` in `{file}`"
    ]


def converted(plan: Plan, *, cast: bool) -> list[str]:
    """One line on parameters that the sides store as different kinds, if there are any."""
    pairs = {name: kinds_of(plan, name) for name in plan.names}
    names = [name for name, (ours, theirs) in pairs.items() if ours != theirs]
    if not names:
        return []
    ours, theirs = pairs[names[0]]
    if cast:
        return [f"of these, {len(names)} after a cast, first `{names[0]}`: {ours} to {theirs}"]
    return [
        f"of these, {len(names)} have the same values in another dtype, first `{names[0]}`: {ours} "
        f"against {theirs}"
    ]
