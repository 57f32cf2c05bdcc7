"""The keys of a job as YAML and the command line have them, with their defaults and types."""

from dataclasses import dataclass, field


@dataclass
class MeshConfig:
    """Sizes of the mesh axes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1


@dataclass
class TopologyConfig:
    """What a topology's YAML may say, for a source and a target alike."""

    topology: str | None = None
    format: str | None = None
    mesh: MeshConfig | None = None
    path: str | None = None
    model: str | None = None
    dtype: str = "keep"
    embedding_dim: str = "auto"
    max_shard_size: str = "5GB"
    rope_interleaved: bool | None = None
    vocab_multiple: int | None = None
    rope: str = "auto"
    keys: str = "auto"
    wrapper: str = "auto"


@dataclass
class SourceConfig(TopologyConfig):
    """Further keys of `src`."""

    replicas: str = "first"
    tied: bool | None = None
    rope_factor: float | None = None
    version: str = "auto"
    instruct: bool | None = None
    assets: str | None = None
    file: str | None = None
    vocab: str | None = None


@dataclass
class TargetConfig(TopologyConfig):
    """Further keys of `dst`."""

    like: str | None = None


@dataclass
class EngineConfig:
    """Keys of `engine`."""

    memory: str = "256MiB"
    exchange: str = "collective"
    writers: str = "nearest"
    backend: str = "auto"
    timeout: float = 1800.0
    fsync: bool = True
    shared_files: str = "auto"
    verify: bool = False
    require_complete: bool = False


@dataclass
class Schema:
    """The whole configuration."""

    src: SourceConfig = field(default_factory=SourceConfig)
    dst: TargetConfig = field(default_factory=TargetConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
