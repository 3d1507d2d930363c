"""One server asked once: python -m flows.doctor.probes NAME; prints what it found, or its error as one line."""

import os
from pathlib import Path

import click

from stages.runtime.errors import InputError, first_line, without_password


@click.group()
def main() -> None:
    """Ask a server whether it answers."""


@main.command()
def remote() -> None:
    """Look into DVC's default remote."""
    from dvc.config import NoRemoteError
    from dvc.repo import Repo

    try:
        odb = Repo().cloud.get_remote_odb()
    except NoRemoteError:
        click.echo("no remote: results stay on this machine")
        return
    except Exception as error:  # noqa: BLE001  # plugins of DVC raise exceptions of many kinds
        raise InputError(f"the remote's settings are wrong ({first_line(error)}); correct .dvc/config") from None
    path = odb.path.removesuffix("/files/md5")
    where = without_password(path if odb.fs.protocol == "local" else odb.fs.unstrip_protocol(path))
    try:
        if odb.fs.protocol == "s3":
            odb.fs.fs.ls(path.partition("/")[0])
        else:
            odb.fs.exists(path)
    except Exception as error:  # noqa: BLE001
        advice = "check its address, the credentials and the network"
        raise InputError(f"the remote {where} cannot be read ({first_line(error)}); {advice}") from None
    click.echo(f"the remote {where} answers")


@main.command()
def store() -> None:
    """List the prefix of ESPALIER_STORE."""
    from stages.storage.s3 import open_store

    found = open_store()
    if found:
        count = len(found.names())
        click.echo(f"{found.uri} answers and holds {count} folders")


@main.command()
def mlflow() -> None:
    """Ask the tracking server for one experiment; the file of SQLite is only looked for, since MLflow would make it."""
    from stages.tracking.mlflow_client import connect, errors, set_environment, sqlite_file

    set_environment()
    address = without_password(os.environ["MLFLOW_TRACKING_URI"])
    file = sqlite_file()
    if file is not None and not file.exists():
        writable = os.access(file.parent if file.parent.exists() else Path(), os.W_OK)
        if not writable:
            raise InputError(f"{file.parent} cannot be written; correct MLFLOW_TRACKING_URI")
        click.echo(f"{address} will be made by the first record")
        return
    with errors(f"at {address} does not answer"):
        connect().search_experiments(max_results=1)
    click.echo(f"{address} answers")


if __name__ == "__main__":
    main()
