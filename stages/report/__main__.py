"""Report on a finished compression."""

from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--artifacts", "models", type=Path, required=True, help="Folder of the model folders.")
@click.option("--reports", type=Path, required=True, help="Folder of the report folders.")
@click.option("--summary", type=Path, required=True, help="Output folder of the results table and the figures.")
@click.option("--released", type=Path, required=True, help="Output folder of the models with their cards.")
@click.option("--page", type=Path, required=True, help="Output file of the page.")
def main(models: Path, reports: Path, summary: Path, released: Path, page: Path) -> None:
    """Write the results table, the figures, the page and the model cards, and record the compression in MLflow."""
    with importing():
        from stages.report.card import release
        from stages.report.figures import draw_figures
        from stages.report.page import check_page, write_page
        from stages.report.report_data import read_report_data
        from stages.report.summary import write_summary
        from stages.storage.files import check_free, write_atomically, writing
        from stages.storage.provenance import write_run_record
        from stages.tracking.compression import Compression, stage_folders
        from stages.tracking.recording import record_all

    folders = stage_folders(models, reports)
    inputs = [*folders.values(), reports / "finetune", reports / "importance"]
    check_free(summary, released, inputs=inputs, stage="report")
    check_page(page, [*inputs, summary, released])
    report = read_report_data(models, reports)
    figures = draw_figures(report)
    content = write_page(report, figures, reports)
    with writing(released) as released_folder, writing(summary) as summary_folder:
        write_summary(report, figures, reports, summary_folder)
        release(report, folders, reports, summary_folder, released_folder)
        for folder in (summary_folder, released_folder):
            write_run_record(folder, "report")
        write_atomically(page, content.encode())
    record_all(Compression(models, reports), Path("unsent"), allow_offline=True)


if __name__ == "__main__":
    end_with_dvc()
    main()
