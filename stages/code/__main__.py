"""Hash the code of each stage."""

from pathlib import Path

import click

from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--out", type=Path, required=True, help="Output folder: one file for each stage.")
def main(out: Path) -> None:
    """Write the hash of the code that each command of stages/ runs; a stage depends on it in place of its source."""
    from stages.runtime.code_hash import STAGES, code_record
    from stages.storage.files import check_free, write_json, writing
    from stages.storage.provenance import write_run_record

    check_free(out, stage="code")
    with writing(out) as folder:
        for main_file in STAGES.glob("*/__main__.py"):
            write_json(folder / f"{main_file.parent.name}.json", code_record(main_file.parent.name))
        write_run_record(folder, "code")


if __name__ == "__main__":
    end_with_dvc()
    main()
