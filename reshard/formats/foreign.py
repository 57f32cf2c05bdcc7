"""Checkpoints that are not read here, told by their files, and what to do with each instead."""

from pathlib import Path

# (files by which it is known, what it is, what to do); the first that matches is named.
FOREIGN = (
    (
        ("model_world_size_*_rank_*.pt",),
        "verl's files of one rank each",
        "merge them with verl's own tool (python -m verl.model_merger merge), then use its "
        "Hugging Face directory",
    ),
    (
        (
            "zero_to_fp32.py",
            "*zero_pp_rank_*",
            "mp_rank_*_model_states.pt",
            "global_step*/*zero_pp*",
        ),
        "a DeepSpeed ZeRO checkpoint",
        "run its own zero_to_fp32.py, then use the directory that it makes",
    ),
    (
        ("adapter_config.json", "adapter_model.*"),
        "a LoRA adapter",
        "merge it into its model first (PEFT: merge_and_unload), then save the whole",
    ),
    (
        ("pytorch_model_fsdp_*rank*.bin", "pytorch_model_fsdp_rank*.bin"),
        "one pickle per rank, of sharded tensors or flat parameters",
        "save again as a DCP directory (SHARDED_STATE_DICT with DCP) or as FULL_STATE_DICT",
    ),
)


def refusal(path: Path) -> str | None:
    """What is in `path` and what to do with it; None for anything else."""
    for patterns, what, remedy in FOREIGN:
        found = next((file for pattern in patterns for file in sorted(path.glob(pattern))), None)
        if found is not None:
            return f"`{found}`: {what}, which is not read here; {remedy}"
    return None
