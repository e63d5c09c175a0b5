"""Where a run's numbers go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from protoseg.runtime.errors import UserError
from protoseg.runtime.extras import import_extra
from protoseg.runtime.files import write_text


class Tracker(Protocol):
    """Takes the numbers of one run; a resumed run goes on in the same place."""

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Log them."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Into the run folder; `writer` takes pictures too."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """With its own client and its settings; the id comes from the run folder."""

    def __init__(self, folder: Path, first_step: int) -> None:
        name = hashlib.sha1(str(folder.resolve()).encode()).hexdigest()[:16]
        wandb = import_extra("wandb", "wandb", "train.track: ")
        self.run = wandb.init(project="protoseg", name=folder.name, id=name, resume="allow", dir=str(folder))

    def numbers(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """With its own client, wherever that is told to write; the run's id is kept in mlflow_run.txt."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.client = import_extra("mlflow", "mlflow", "train.track: ").MlflowClient()
        kept = folder / "mlflow_run.txt"
        if first_step and kept.is_file():
            self.run = kept.read_text().strip()
            self.client.update_run(self.run, status="RUNNING")
            return
        found = self.client.get_experiment_by_name("protoseg")
        experiment = found.experiment_id if found else self.client.create_experiment("protoseg")
        self.run = self.client.create_run(experiment, run_name=folder.name).info.run_id
        write_text(kept, self.run + "\n")

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)


TRACKERS: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": Mlflow}


def start_tracker(name: str, folder: Path, first_step: int) -> Tracker:
    """Errors: UserError where its client is not installed, or does not start with its settings."""
    try:
        return TRACKERS[name](folder, first_step)
    except UserError:
        raise
    except Exception as error:  # whatever their clients meet: no login, no server, no store
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"train.track: {name} does not start ({reason:.300}); mend its settings, or leave it out"
        ) from None
