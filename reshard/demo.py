"""The job that runs without paths: it makes a tiny model in the source's layout and reshards it."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from reshard import families, formats, job
from reshard.config import JobConfig, Side
from reshard.distributed import Ranks
from reshard.errors import ConfigError
from reshard.families.model import Json, ModelConfig, from_hf
from reshard.formats import common
from reshard.formats.options import Options

SEED = 0
TINY: dict[str, Json] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "intermediate_size": 704,
    "vocab_size": 2048,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}


class Demo:
    """A tiny model below `root`; its source is made once and used again."""

    def __init__(self, config: JobConfig, root: Path) -> None:
        if config.source.format is None or config.target.format is None:
            raise ConfigError(
                "src.path: which checkpoint? give src.path=DIR (and --src and --dst name "
                "topologies)"
            )
        self._config, self._root = config, root
        self._names = tuple(
            formats.named(str(side.format))
            .layout(families.parameters(self._model()), self._model(), side.options)
            .name
            for side in (config.source, config.target)
        )

    @staticmethod
    def _model() -> ModelConfig:
        return from_hf(TINY, "demo")

    def first_line(self) -> str:
        """What this is."""
        source, target = self._names
        return (
            f"DEMO: no paths given; a tiny seeded Llama goes from {source} to {target} "
            f"in ./{self._root}/"
        )

    def make_source(self, ranks: Ranks) -> JobConfig:
        """Make the source once, and return the job from it."""
        seed, source = self._root / "seed", self._root / f"source-{self._names[0]}"
        if ranks.rank == 0 and not (seed / "config.json").exists():
            self._make_seed(seed)
        ranks.barrier("demo model made")
        source_side = replace(self._config.source, path=source)
        target_side = replace(self._config.target, path=self._root / f"target-{self._names[1]}")
        plain = Side("hf", seed, Options(), None)
        made = replace(self._config, source=plain, target=replace(source_side, dtype=None))
        job.run(made, ranks, force=False, say=lambda line: None)
        return replace(self._config, source=source_side, target=target_side)

    def _make_seed(self, seed: Path) -> None:
        """Random weights in Hugging Face's layout; config.json comes last and says all is there."""
        seed.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(SEED)
        tensors = {
            parameter.name: torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
            * 0.02
            for parameter in families.parameters(self._model())
        }
        save_file(tensors, seed / "model.safetensors", {"format": "pt"})
        (seed / "config.json").write_bytes(common.dump_json(TINY))
