"""The error tree. An error's class says what the caller does next.

    SemwatchError
    ├── ConfigError          settings or recipe are wrong: stop, the message says what to fix
    ├── ModelMismatch        model repository and daemon do not fit each other: stop, the message says what to fix
    ├── ImageError           this file cannot be reviewed: quarantine it with the reason, go on with the next
    ├── ServiceUnavailable   Redis, the models or a disk are away: back off, lose nothing
    │   └── FileUnavailable  work on this one file failed, another try may mend it: the file waits, no other does
    ├── PublishError         a new model version could not be published: keep the old one
    └── klarf.KlarfError     a KLARF cannot be read or edited: leave it alone, the message names line and column

Drivers' errors are translated where the driver is used. Anything that is not in this tree is a bug. In the work on one
file it is that file's (``service.faults``); anywhere else it may crash the daemon: the ledger brings the work back.
"""

from collections.abc import Mapping
from types import MappingProxyType


class SemwatchError(Exception):
    """Root of every error that semwatch raises on purpose."""


class ConfigError(SemwatchError):
    """Settings or recipe are wrong; the message names file, line and remedy."""


class ModelMismatch(SemwatchError):
    """The model repository does not fit this daemon or itself; the message names the model and the remedy."""


class ImageError(SemwatchError):
    """This file cannot be reviewed: it goes to quarantine with this message as the reason."""


class ServiceUnavailable(SemwatchError):
    """A service that the line needs is away for now: wait and try the same file again."""


class FileUnavailable(ServiceUnavailable):
    """Work on one file failed in a way that another try may mend: let that file wait."""


class PublishError(SemwatchError):
    """A model version could not be published; what served before goes on serving."""


EXIT_CODES: Mapping[type[SemwatchError], int] = MappingProxyType(
    {ConfigError: 2, ModelMismatch: 3, ServiceUnavailable: 4, FileUnavailable: 4}
)
"""What a command ends with; any other error of ours is 1. The units' restart rules hang on them: 2 and 3 are for what
only a person can mend, such as settings, and are not tried again."""


class ForeignRecord(ServiceUnavailable):
    """Redis answers, and holds what is no record of ours where one of ours should be."""


def exit_code(error: SemwatchError) -> int:
    """What a command ends with that meets an error of ours."""
    return EXIT_CODES.get(type(error), 1)
