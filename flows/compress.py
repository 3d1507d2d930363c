"""The stages of dvc.yaml and a record -> one flow."""

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows.commands import run, stage_names


@flow(log_prints=False, persist_result=False)
def compress() -> State[None]:
    """Bring every stage up to date, in the order of dvc.yaml, then make sure that MLflow has the result."""
    for stage in stage_names():
        state = reproduce.with_options(task_run_name=stage)(stage, return_state=True)
        if not state.is_completed():
            return Failed(message=f"stage {stage} failed")
    state = record.with_options(task_run_name="record")(return_state=True)
    return Completed() if state.is_completed() else Failed(message="the result could not be recorded")


@task(cache_policy=NO_CACHE, persist_result=False)
def reproduce(stage: str) -> State[None]:
    """Let DVC run a stage if anything that it depends on has changed."""
    return _tell(["dvc", "--wait-for-lock", "repro", "--single-item", stage])


@task(cache_policy=NO_CACHE, persist_result=False)
def record() -> State[None]:
    """Record the compression in MLflow unless it is there."""
    return _tell(["python", "-m", "stages.tracking", "--allow-offline"])


def _tell(command: list[str]) -> State[None]:
    """Run a command with its lines in the flow's log; a failure is a state and one line, not a traceback."""
    exit_code = run(command, get_run_logger().info)
    return Completed() if exit_code == 0 else Failed(message=f"{' '.join(command)} ended with {exit_code}")
