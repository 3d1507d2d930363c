"""What came of a compression -> a record that travels as a label of its flow run, from any worker to a sweep."""

from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import flow_run
from pydantic import ValidationError

from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen

LABEL = "espalier.outcome"


class Outcome(Frozen):
    """What came of a compression."""

    ran: tuple[str, ...]
    """The stages that computed; DVC had the outputs of the others."""
    mlflow_run: str | None
    """None while MLflow is unavailable; the record waits in the folder of unsent records."""
    version: str | None = None
    """Address of the registered version, models:/NAME/3; None where none was to be registered."""

    def __str__(self) -> str:
        """Describe it for the list of runs."""
        stages = f"ran {', '.join(self.ran)}" if self.ran else "nothing had changed"
        record = f"MLflow run {self.mlflow_run}" if self.mlflow_run else "MLflow is unavailable, the record waits"
        return "; ".join([stages, record, *([self.version] if self.version else [])])


def attach_outcome(outcome: Outcome) -> None:
    """Attach an outcome to the current flow run."""
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(flow_run.id), {LABEL: outcome.model_dump_json()})


def read_outcome(run: FlowRun) -> Outcome:
    """Read the outcome of a finished flow run.

    Raises:
        InputError: The run has none, as with workers of another version.
    """
    try:
        return Outcome.model_validate_json(str(run.labels.get(LABEL)))
    except ValidationError:
        raise InputError(f"run {run.name} has no label {LABEL}; update the workers to this version") from None
