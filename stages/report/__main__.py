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
    from stages import artifacts
    from stages.compression import stage_homes
    from stages.provenance import write_run_record
    from stages.report.card import release
    from stages.report.figures import draw_figures
    from stages.report.page import check_page, write_page
    from stages.report.story import read_story
    from stages.report.summary import write_summary

    homes = stage_homes(models, reports)
    inputs = [*homes.values(), reports / "finetune", reports / "importance"]
    artifacts.check_free(summary, released, inputs=inputs, stage="report")
    check_page(page, [*inputs, summary, released])
    story = read_story(models, reports)
    figures = draw_figures(story)
    content = write_page(story, figures, reports)
    with artifacts.writing(released) as released_folder, artifacts.writing(summary) as summary_folder:
        write_summary(story, figures, reports, summary_folder)
        release(story, homes, reports, summary_folder, released_folder)
        for folder in (summary_folder, released_folder):
            write_run_record(folder, "report")
        artifacts.write_atomically(page, content.encode())


if __name__ == "__main__":
    main()
