"""What can go wrong, by kind; a message is one line: the thing, found and expected, what to do."""


class ReshardError(Exception):
    """Base of all errors that the program reports in one line."""

    exit_code = 1


class ConfigError(ReshardError):
    """The command line, a topology or a model config asks for something that cannot be done."""

    exit_code = 2


class LayoutError(ReshardError):
    """A layout cannot hold a model, or two layouts do not describe the same parameters."""

    exit_code = 2


class CheckpointError(ReshardError):
    """A file of a checkpoint is missing, damaged, or not what its layout says."""

    exit_code = 2


class UndescribedError(CheckpointError):
    """Weights are there, but no config says of which model."""


class StorageError(ReshardError):
    """Reading, writing or publishing failed in a way that trying again may mend."""


class IncompleteError(ReshardError):
    """A target would lack small files that the job was told to require."""


class PeerError(ReshardError):
    """Another rank failed, died, or stopped making progress."""


class VerifyError(ReshardError):
    """Two checkpoints differ, or a checkpoint differs from its manifest."""
