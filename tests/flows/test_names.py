"""Names of task runs, which Prefect reads as templates."""

from prefect import flow, task
from prefect.runtime import task_run
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.tasks.names import literal_name


@task
def own_name():
    """Return the name of the run."""
    return task_run.name


def test_braces_of_a_value_are_kept(prefect_server):
    """A block such as prune.depth can be swept: its text is in the names of all tasks of a cell."""
    name = "depth {'remove': 1, 'order': 'greedy'}, seed 0: {} {{finetune"
    with temporary_settings({PREFECT_API_URL: prefect_server.uri, PREFECT_API_AUTH_STRING: prefect_server.auth}):

        @flow(persist_result=False)
        def of_a_flow():
            return own_name.with_options(task_run_name=literal_name(name))()

        assert of_a_flow() == name
