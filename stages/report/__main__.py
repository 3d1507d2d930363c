"""Tell the story of a finished compression."""

from pathlib import Path

import click


@click.command()
@click.option("--artifacts", "models", type=Path, required=True, help="The folder of model folders.")
@click.option("--reports", type=Path, required=True, help="The folder of report folders.")
@click.option("--summary", type=Path, required=True, help="Where results table and figures go.")
@click.option("--released", type=Path, required=True, help="Where the models with their cards go.")
@click.option("--page", type=Path, required=True, help="Where the page goes.")
def main(models: Path, reports: Path, summary: Path, released: Path, page: Path) -> None:
    """Write the results table, the figures, the page, and a card beside every model."""
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
    main()
