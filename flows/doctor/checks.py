"""The checks of `espalier doctor`, in order, and how one of them is run."""

from collections.abc import Callable, Iterator

from flows.doctor.finding import Finding
from flows.doctor.machine import check_device, check_disk, check_environment, check_packages, check_python
from flows.doctor.project import check_extractor, check_git, check_params
from flows.doctor.servers import check_mlflow, check_prefect, check_remote, check_store
from stages.runtime.errors import InputError, first_line, shown, without_password

Check = Callable[[], Iterator[Finding]]

CHECKS: dict[str, Check] = {
    "Python": check_python,
    "packages": check_packages,
    "device": check_device,
    "disk": check_disk,
    "network": check_environment,
    "params": check_params,
    "extractor": check_extractor,
    "Git": check_git,
    "DVC": check_remote,
    "store": check_store,
    "MLflow": check_mlflow,
    "Prefect": check_prefect,
}


def run_check(check: Check) -> Iterator[Finding]:
    """Yield what a check finds; whatever it raises is a finding, too. Texts are one line without passwords."""
    try:
        for status, text in check():
            yield Finding(status, shown(text))
    except InputError as error:
        yield Finding("fail", shown(without_password(error.message)))
    except (Exception, SystemExit) as error:  # noqa: BLE001  # a broken package may raise anything
        yield Finding("fail", shown(first_line(error)))
