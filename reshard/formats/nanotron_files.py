"""Small texts of a Nanotron checkpoint: header slices, model_config.json, config.yaml, metadata."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import OmegaConf

from reshard.containers import shown
from reshard.families.model import Json, ModelConfig
from reshard.formats.options import Mesh
from reshard.layout import Layout

VERSION = "1.5"
WHOLE = "None,None,None"
SLICES, SHAPE = "local_global_slices_pairs", "unsharded_shape"

# What Qwen2Config has besides the keys of LlamaConfig, as by default.
QWEN2: dict[str, Json] = {
    "is_qwen2_config": True,
    "rope_seq_len_interpolation_factor": None,
    "flex_attention_mask": None,
    "sliding_window_size": None,
    "no_rope_layer": None,
    "_fused_rotary_emb": True,
    "_fused_rms_norm": True,
    "_use_qkv_packed": True,
    "_use_doc_masking": False,
    "log_attn_probs": True,
    "ring_attn_heads_k_stride": None,
    "moe_config": None,
}

# Sections of config.yaml that depend on no model: what Nanotron needs to start.
GENERAL: dict[str, object] = {
    "project": "reshard",
    "run": "converted",
    "seed": 42,
    "step": 0,
    "consumed_train_samples": 0,
    "ignore_sanity_checks": True,
    "benchmark_csv_path": None,
}
CHECKPOINTS: dict[str, object] = {
    "checkpoint_interval": 1000,
    "checkpoints_path": "checkpoints",
    "checkpoints_path_is_shared_file_system": False,
    "resume_checkpoint_path": None,
    "load_optimizer": False,
    "load_lr_scheduler": False,
    "save_initial_state": False,
    "save_final_state": True,
}
TOKENIZER: dict[str, object] = {
    "tokenizer_name_or_path": "none",
    "tokenizer_revision": None,
    "tokenizer_max_length": None,
}
OPTIMIZER: dict[str, object] = {
    "accumulate_grad_in_fp32": True,
    "clip_grad": 1.0,
    "learning_rate_scheduler": {
        "learning_rate": 0.0003,
        "lr_decay_starting_step": None,
        "lr_decay_steps": 98,
        "lr_decay_style": "cosine",
        "lr_warmup_steps": 2,
        "lr_warmup_style": "linear",
        "min_decay_lr": 1.0e-05,
    },
    "optimizer_factory": {
        "name": "adamW",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1.0e-08,
        "torch_adam_is_fused": False,
    },
    "weight_decay": 0.01,
    "weight_decay_exclude_named_params": [],
    "zero_stage": 0,
}
LOGGING: dict[str, object] = {
    "iteration_step_info_interval": 1,
    "log_level": "info",
    "log_level_replica": "info",
}
DATA: dict[str, object] = {
    "dataset": {
        "hf_dataset_or_datasets": "none",
        "hf_dataset_config_name": None,
        "hf_dataset_splits": "train",
        "text_column_name": "text",
        "dataset_processing_num_proc_per_process": 1,
        "dataset_overwrite_cache": False,
    },
    "num_loading_workers": 1,
    "seed": 42,
}


@dataclass(frozen=True, slots=True)
class Sharded:
    """A stored tensor that tensor parallelism cuts along `dim`.

    `chunks` are the sizes of its fused parts along `dim`, `shape` is the whole tensor's.
    """

    chunks: tuple[int, ...]
    dim: int
    shape: tuple[int, ...]


def shard_metadata(
    table: Mapping[str, Sharded], tp: int, template: str, shard: int
) -> dict[str, str]:
    """The header of a file: exactly three entries where the tensor is sharded, else none."""
    if template not in table:
        return {}
    sharded, pairs = table[template], []
    start = 0
    for size in sharded.chunks:
        step = size // tp
        local = (
            f"{start // tp},{start // tp + step},None"
            if sharded.dim == 0 and len(sharded.chunks) > 1
            else WHOLE
        )
        here = f"{start + shard * step},{start + (shard + 1) * step},None"
        pairs.append("#".join(_dims(sharded, text) for text in (local, here)))
        start += size
    return {"version": VERSION, SLICES: ";".join(pairs), SHAPE: str(sharded.shape)}


def _dims(sharded: Sharded, text: str) -> str:
    """A slice of the dim that is cut, among those of the other dims, which are whole."""
    dims = [WHOLE] * len(sharded.shape)
    dims[sharded.dim] = text
    return "|".join(dims)


def wrong_slices(layout: Layout, file: str, found: Mapping[str, object]) -> str | None:
    """What is wrong with the header of `file`, which must name the slices that the layout says."""
    expected = layout.header(file)
    for key in (SLICES, SHAPE) if expected else ():
        if key not in found:
            return f"`{file}`: its header has no `{key}`"
        # numpy 2 prints the sizes of fused tensors as np.int64(128)
        text, wanted = re.sub(r"np\.int64\((\d+)\)", r"\1", str(found[key])), str(expected[key])
        if text.replace(" ", "") != wanted.replace(" ", ""):
            return f"`{file}`: its header says {key} {shown(text)}, expected {wanted[:80]}"
    return None


def model_config(model: ModelConfig, rope_interleaved: bool) -> dict[str, Json]:
    """Nanotron's LlamaConfig, or its Qwen2Config for a model with biases on q, k and v."""
    qwen = model.model_type == "qwen2"
    eos = model.eos[0] if isinstance(model.eos, list) else model.eos
    scaling = dict(model.rope_scaling) if model.rope_scaling is not None else None
    return {
        "bos_token_id": model.bos,
        "eos_token_id": eos,
        "hidden_act": model.extras.get("hidden_act", "silu"),
        "hidden_size": model.hidden,
        "initializer_range": model.extras.get("initializer_range", 0.02),
        "intermediate_size": model.intermediate,
        **(QWEN2 if qwen else {"is_llama_config": True}),
        "max_position_embeddings": model.max_positions,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "attention_bias": qwen,
        "num_key_value_heads": model.kv_heads,
        "pad_token_id": model.pad,
        "pretraining_tp": 1,
        "rms_norm_eps": model.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": model.rope_theta,
        "rope_interleaved": rope_interleaved,
        "tie_word_embeddings": model.tied,
        "use_cache": True,
        "vocab_size": model.vocab,
        "_attn_implementation": "flash_attention_2",
        "z_loss_enabled": False,
        "z_loss_coefficient": 0.0001,
    }


def checkpoint_metadata(mesh: Mesh) -> dict[str, object]:
    """checkpoint_metadata.json of a checkpoint that has seen no training step."""
    return {
        "version": VERSION,
        "tp": mesh.tp,
        "dp": mesh.dp,
        "cp": 1,
        "custom_metas": None,
        "metas": {
            "consumed_train_samples": 0,
            "consumed_tokens_total": 0,
            "last_train_step": 0,
            "last_stage_idx": 0,
            "data_stages": [
                {
                    "name": "Stage 1",
                    "start_training_step": 1,
                    "consumed_train_samples": 0,
                    "sequence_length": 4096,
                    "consumed_tokens_per_dataset_folder": {},
                }
            ],
        },
    }


def training_config(model: ModelConfig, config: Mapping[str, Json], mesh: Mesh) -> bytes:
    """A config.yaml that Nanotron accepts, to be edited for a real run.

    It loads neither optimizer nor scheduler, which are not here. `init_method.path` is relative, so
    that a run from elsewhere fails loudly instead of starting from random weights.
    """
    sequence_length = min(model.max_positions, 4096)
    stage = {
        "name": "Stage 1",
        "start_training_step": 1,
        "sequence_length": sequence_length,
        "data": DATA,
    }
    record = {
        "general": GENERAL,
        "checkpoints": CHECKPOINTS,
        "model": {
            "ddp_bucket_cap_mb": 25,
            "dtype": model.dtype,
            "init_method": {"path": "."},
            "make_vocab_size_divisible_by": 1,
            "model_config": dict(config),
        },
        "parallelism": _parallelism(mesh),
        "tokenizer": TOKENIZER,
        "optimizer": OPTIMIZER,
        "tokens": {
            "batch_accumulation_per_replica": 1,
            "limit_test_batches": 0,
            "limit_val_batches": 0,
            "micro_batch_size": 1,
            "sequence_length": sequence_length,
            "train_steps": 100,
            "val_check_interval": -1,
        },
        "logging": LOGGING,
        "data_stages": [stage],
        "lighteval": None,
        "metrics_logging": None,
        "profiler": None,
        "s3_upload": None,
    }
    return OmegaConf.to_yaml(OmegaConf.create(record), sort_keys=True).encode()


def _parallelism(mesh: Mesh) -> dict[str, object]:
    return {
        "tp": mesh.tp,
        "pp": mesh.pp,
        "dp": mesh.dp,
        "context_parallel_size": 1,
        "expert_parallel_size": 1,
        "pp_engine": "1f1b",
        "recompute_layer": False,
        "tp_linear_async_communication": mesh.tp > 1,
        "tp_mode": "REDUCE_SCATTER" if mesh.tp > 1 else "ALL_REDUCE",
        "tp_recompute_allgather": True,
    }
