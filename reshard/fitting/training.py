"""Full AdamW training: Nanotron's tp x pp x dp, and FSDP as accelerate and TorchTitan have it.

Bytes per parameter, all counted. Nanotron in bfloat16: weights 2, gradients accumulated in float32
4, master weights 4, two moments 8 (`accumulate_grad_in_fp32: true` and `zero_stage: 0`, as in the
config.yaml that its layout comes with). FSDP: weights, gradients and two moments in float32, all
sharded (TorchTitan's `training.dtype = float32`; accelerate upcasts trainable weights), and while
a layer is at work two gathered ones in bfloat16 and the gradients of one.
"""

from reshard.errors import ConfigError, LayoutError
from reshard.families.model import ModelConfig
from reshard.fitting.gpus import Gpus
from reshard.fitting.memory import (
    ALLOWANCE,
    Share,
    activation_bytes,
    first_share,
    fullest,
    largest_block,
    shares,
)
from reshard.fitting.meshes import gpus_of, name_of, with_fewer
from reshard.fitting.moving import already, checked, moved
from reshard.fitting.rows import FallenOut, Row, Section, gib
from reshard.fitting.subject import Subject, laid_out, refusal
from reshard.formats.options import Mesh, Options
from reshard.layout import Layout

NANOTRON_BYTES, FSDP_BYTES = 18, 16
GATHERED_BYTES = 6  # per element of a layer: two in 16 bits, the gradients of one in 16 bits
DEFAULT_SEQUENCE = 4096
ROWS_SHOWN, MAX_SEARCHED = 4, 4096
NAME = "nanotron"
TITLE = "TRAINING, full AdamW"


def section(subject: Subject, gpus: Gpus, context: int | None) -> Section:
    """Layouts to train in, those that fit first; where none does, those that hold the weights."""
    sequence = context or _sequence(subject.known)
    whose = "" if context is not None else ", the default: --context sets it"
    rows, fallen = nanotron(subject, gpus, sequence)
    sharded, others = _fsdp(subject, gpus, sequence)
    every = [*rows, *sharded]
    fits = any(row.fits for row in every)
    verdict = "full AdamW training fits" if fits else _does_not(subject, gpus, sequence, whose)
    said = (verdict, _allowed(subject, sequence))
    if fits:
        fallen += [FallenOut(row.target, row.said[0]) for row in every if not row.fits]
        every = [row for row in every if row.fits]
    return Section("training", TITLE, said, tuple(every), (*fallen, *others))


def _sequence(model: ModelConfig | None) -> int:
    return DEFAULT_SEQUENCE if model is None else min(DEFAULT_SEQUENCE, model.max_positions)


def _allowed(subject: Subject, sequence: int) -> str:
    """What is counted, and what besides states, in a sentence."""
    block = largest_block(subject.parameters)
    gathered = (
        f"the largest unit gathered by FSDP, twice in 16 bits and its gradients once: "
        f"{GATHERED_BYTES} x {block:,} bytes, {gib(GATHERED_BYTES * block)}, on each GPU"
    )
    if subject.known is None:
        return (
            f"counted: {FSDP_BYTES} bytes per parameter (fp32 weights 4, gradients 4, moments 8); "
            f"{gathered}; no activations: the model's sizes are not known; {gib(ALLOWANCE)} per "
            "GPU kept"
        )
    worth = gib(activation_bytes(subject.known, sequence))
    return (
        f"counted: {NANOTRON_BYTES} bytes per parameter in Nanotron (bf16 weights 2, fp32 "
        f"gradients 4, master 4, moments 8), {FSDP_BYTES} in FSDP (fp32 4, 4, 8); {gathered}; "
        f"activations of 1 sequence of {sequence:,}, layers recomputed: {worth} / tp; "
        f"{gib(ALLOWANCE)} per GPU kept"
    )


def _does_not(subject: Subject, gpus: Gpus, sequence: int, whose: str) -> str:
    """That nothing fits, with figures, and how many GPUs would do, for sequences of what length."""
    fixed = _fixed(subject, sequence)
    needed = subject.elements * FSDP_BYTES + fixed * gpus.count
    count = _enough(subject, gpus, fixed)
    more = (
        "no number of them would do: what each needs besides shards does not fit"
        if count is None
        else f"{count} of them would do (fsdp{count})"
    )
    length = f" with sequences of {sequence:,} tokens{whose}" if subject.known is not None else ""
    return (
        f"full AdamW training does not fit: needs {gib(needed)} on {gpus.count} "
        f"GPU{'s' if gpus.count > 1 else ''} with {gib(gpus.total)} "
        f"({gib(subject.elements * FSDP_BYTES)} of states); {more}{length}"
    )


def _fixed(subject: Subject, sequence: int) -> int:
    """Bytes that FSDP takes on each GPU, however many there are."""
    return _active(subject, sequence) + GATHERED_BYTES * largest_block(subject.parameters)


def _enough(subject: Subject, gpus: Gpus, fixed: int) -> int | None:
    """The fewest GPUs of a kind on which FSDP fits."""
    room = gpus.memory - fixed
    if room <= 0:
        return None
    count = max(1, -(-subject.elements * FSDP_BYTES // room))
    while count <= MAX_SEARCHED:
        made = laid_out(subject, "fsdp", Options(mesh=Mesh(dp=count)))
        if first_share(made).elements * FSDP_BYTES <= room:
            return count
        count += 1
    return None


def _fsdp(subject: Subject, gpus: Gpus, sequence: int) -> tuple[list[Row], list[FallenOut]]:
    """A shard for each GPU: for accelerate and llama-recipes, and for TorchTitan."""
    rows, fallen = [], []
    for name, whose in (("fsdp", "accelerate, llama-recipes"), ("titan", "TorchTitan")):
        target = f"{name}{gpus.count}"
        try:
            made = laid_out(subject, name, Options(mesh=Mesh(dp=gpus.count)))
        except (LayoutError, ConfigError) as error:
            fallen.append(FallenOut(target, str(error)))
            continue
        share = first_share(made)
        needed = share.elements * FSDP_BYTES + _fixed(subject, sequence)
        row = _row(
            subject,
            gpus,
            made,
            (f"{target}: {whose} {gpus.on(gpus.count)}", target, gpus.count),
            (share, needed),
        )
        rows += [row] if row is not None else []
        if row is None:
            fallen.append(_too_large(target, share, gpus))
    return rows, fallen


def _row(
    subject: Subject,
    gpus: Gpus,
    made: Layout,
    names: tuple[str, str, int],
    held: tuple[Share, int],
    extra: tuple[str, ...] = (),
) -> Row | None:
    """A layout that fits, or whose weights at least do; None where not even these."""
    (name, target, used), (share, needed) = names, held
    fits, allowed = needed <= gpus.memory, gpus.memory - ALLOWANCE
    if share.nbytes > allowed:
        return None
    said = f"{gib(share.nbytes)} of weights on the fullest GPU; training takes {gib(needed)}"
    if not fits:
        said = f"weights only: {said}, there are {gib(gpus.memory)}"
    return Row(
        name=name,
        target=target,
        gpus=used,
        fits=fits,
        said=(said, *already(subject, made)),
        commands=moved(subject, gpus, made, target, *extra),
        check=checked(subject, made, target),
        figures={"weights_bytes": share.nbytes, "training_bytes": needed},
    )


def _too_large(target: str, share: Share, gpus: Gpus) -> FallenOut:
    allowed = gib(gpus.memory - ALLOWANCE)
    return FallenOut(target, f"{gib(share.nbytes)} of weights per GPU, but {allowed} are left")


def nanotron(subject: Subject, gpus: Gpus, sequence: int) -> tuple[list[Row], list[FallenOut]]:
    """Meshes in which training fits, the most data-parallel first; else those without any.

    Of what falls out, those without data parallelism are named.
    """
    meshes = _meshes(subject, gpus)
    plain = {mesh: _on_mesh(subject, gpus, mesh, sequence) for mesh in meshes if mesh.dp == 1}
    fallen = [found for found in plain.values() if isinstance(found, FallenOut)]
    fits: list[Row] = []
    for mesh in sorted(meshes, key=lambda mesh: -mesh.dp):
        if len(fits) < ROWS_SHOWN and _least(subject, mesh, sequence) <= gpus.memory:
            found = plain.get(mesh) or _on_mesh(subject, gpus, mesh, sequence)
            fits += [found] if isinstance(found, Row) and found.fits else []
    held = [found for found in plain.values() if isinstance(found, Row)]
    return fits or held[:ROWS_SHOWN], fallen


def _meshes(subject: Subject, gpus: Gpus) -> list[Mesh]:
    """Every mesh of all GPUs whose tp is within a node, the larger tp first; then one of fewer."""
    count, per_node = gpus.count, gpus.per_node
    every = [
        Mesh(tp, pp, count // tp // pp)
        for tp in range(per_node, 0, -1)
        if per_node % tp == 0
        for pp in range(count // tp, 0, -1)
        if count // tp % pp == 0
    ]

    def legal(tp: int) -> bool:
        options = Options(mesh=Mesh(tp=tp), vocab_multiple=1)
        return refusal(subject, NAME, options) is None

    layers = count if subject.known is None else subject.known.layers
    return with_fewer(every, gpus, layers, legal)


def _least(subject: Subject, mesh: Mesh, sequence: int) -> int:
    """Bytes on a GPU if all were cut evenly: no mesh that is laid out takes less."""
    states = subject.elements // (mesh.tp * mesh.pp) * NANOTRON_BYTES
    return states + _active(subject, sequence, mesh.tp)


def _active(subject: Subject, sequence: int, tp: int = 1) -> int:
    """What a GPU needs besides states."""
    model = subject.known
    return ALLOWANCE + (0 if model is None else activation_bytes(model, sequence, tp))


def _on_mesh(subject: Subject, gpus: Gpus, mesh: Mesh, sequence: int) -> Row | FallenOut:
    """A mesh as the format lays it out, its vocabulary padded where it must be."""
    target, options = name_of(mesh), Options(mesh=mesh)
    if (why := refusal(subject, NAME, options)) is not None:
        options = Options(mesh=mesh, vocab_multiple=1)
        if refusal(subject, NAME, options) is not None:
            return FallenOut(target, why)
    made = laid_out(subject, NAME, options)
    # The last stage has a copy of a tied table, but with fewer layers than the first one beside it.
    share = fullest(shares(made))
    needed = share.elements * NANOTRON_BYTES + _active(subject, sequence, mesh.tp)
    used = gpus_of(mesh)
    names = f"{target}: Nanotron {gpus.on(used)}", target, used
    padded = () if options.vocab_multiple is None else ("dst.vocab_multiple=1",)
    row = _row(subject, gpus, made, names, (share, needed), padded)
    return row or _too_large(target, share, gpus)
