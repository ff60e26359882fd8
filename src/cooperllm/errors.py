"""Exceptions a caller may catch.

CooperLLMError
├── ConfigError          (also ValueError)  a value the user gave: a setting, a file, a column, a name
├── RunDirectoryError                       a run directory that cannot be used as it is
├── PackageError                            a device package that is damaged or does not run here
├── ProtocolError                           a message that does not fit
│   ├── DecodeError                         bytes that are not a message of this version
│   └── ReplayMismatchError                      a replica that differs from the cloud's: its numbers must not count
├── LinkError                               the engine failed; the engine's own exception is __cause__
├── DivergenceError                         the cloud's own numbers are no longer finite
└── QuorumError                             too few usable reports to close a round
"""


class CooperLLMError(Exception):
    """Base of every exception this package raises on purpose."""


class ConfigError(CooperLLMError, ValueError):
    """A value the user gave is outside its domain."""


class RunDirectoryError(CooperLLMError):
    """A run directory is missing, damaged or in use; the sentence names the file and what to do."""


class PackageError(CooperLLMError):
    """A device package is missing, damaged, of another version, or does not run here; the sentence names the file and what to do."""


class ProtocolError(CooperLLMError):
    """A message does not fit the round it claims to belong to."""


class DecodeError(ProtocolError):
    """Bytes that arrived are not a well-formed message of this version."""


class ReplayMismatchError(ProtocolError):
    """A replica holds other parameters than the cloud at the same version."""


class LinkError(CooperLLMError):
    """The federation engine failed; its own exception is the cause."""


class DivergenceError(CooperLLMError):
    """The public gradient is not finite: the run has diverged and can only be repeated with a smaller step."""


class QuorumError(CooperLLMError):
    """Too few devices gave usable reports to close the round.

    Attributes:
        round_index: Round that could not be closed, from 0.
        received: Usable reports.
        required: Usable reports required.
        dropped: Why the others were dropped.
    """

    def __init__(self, *, round_index: int, received: int, required: int, dropped: str) -> None:
        super().__init__(
            f"round {round_index}: {received} usable device reports, {required} required ({dropped}); "
            "lower `min_reports`, or look at why reports are dropped"
        )
        self.round_index = round_index
        self.received = received
        self.required = required
        self.dropped = dropped
