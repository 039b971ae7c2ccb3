"""The errors a person may see; each says what, where, the value and the remedy. Knows nothing else of the project.

LabError
├── ConfigError      settings of a run that cannot work, all of them at once
├── DatasetError     a file that cannot be trained on, with line numbers
├── ModelError       a base model that cannot be found, read or used
├── HubError         a repository that cannot be read or written
├── DeviceError      hardware or driver that cannot do what was asked
├── RunError         a run that does not exist or is in the wrong state
└── TrainingError    a run that cannot go on: memory, a loss that is not finite
"""


class LabError(Exception):
    """Carries one or more problems, each a full sentence; `str()` joins them, one a line."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems: tuple[str, ...] = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class ConfigError(LabError):
    pass


class DatasetError(LabError):
    pass


class ModelError(LabError):
    pass


class HubError(LabError):
    pass


class DeviceError(LabError):
    pass


class RunError(LabError):
    pass


class TrainingError(LabError):
    pass
