"""Why a run's tracker cannot log here, as a sentence before the run starts. Knows nothing of any tracker's API."""

import importlib.util
import os
from collections.abc import Mapping

from qlora_core.config import TrainConfig

# Package and installable name are the same for all of them.
PACKAGES = ("trackio", "wandb", "mlflow", "tensorboard")
# With these set trackio logs elsewhere, which needs a token, and no training process has one.
TRACKIO_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID")
WANDB_WITHOUT_KEY = ("offline", "disabled", "dryrun")


def problem(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """Why the run's tracker cannot be used here, and the remedy; None when it can."""
    tracker = config.tracker
    if tracker not in PACKAGES:
        return None
    if not is_installed(tracker):
        return f"tracker is {tracker!r}, but its package is not installed here; `pip install {tracker}`, or set tracker to none"
    offline = environment.get("WANDB_MODE") in WANDB_WITHOUT_KEY
    if tracker == "wandb" and not offline and not environment.get("WANDB_API_KEY"):
        return (
            "tracker is 'wandb', but it has no key: set WANDB_API_KEY in the environment of this app, or "
            "WANDB_MODE=offline to keep its files in the run's folder, or set tracker to none"
        )
    remote = [name for name in TRACKIO_REMOTE if environment.get(name)]
    if tracker == "trackio" and remote:
        return (
            f"tracker is 'trackio', which logs to a local folder here, but {' and '.join(remote)} is set, and a training "
            "process has no token to log elsewhere; unset it, or set tracker to none"
        )
    return None


def is_installed(package: str) -> bool:
    """A mere folder of that name does not count: wandb and mlflow leave one where they ran."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
