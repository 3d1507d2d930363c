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
    from stages.provenance import write_run_record
    from stages.report.card import release
    from stages.report.figures import draw_figures
    from stages.report.page import write_page
    from stages.report.story import read_story
    from stages.report.summary import write_summary
    from stages.report.table import to_markdown

    artifacts.check_free(summary, released)
    story = read_story(models, reports)
    figures = draw_figures(story)
    with artifacts.writing(summary) as folder:
        artifacts.write_atomically(folder / "results.md", to_markdown(story.evaluation).encode())
        write_summary(story, reports, folder / "summary.png")
        for name, themes in figures.items():
            artifacts.write_atomically(folder / f"{name}.svg", themes["light"])
        write_run_record(folder, "report")
    with artifacts.writing(released) as folder:
        for name in ("pruned", "finetuned"):
            release(story, name, models / name, reports, folder / name)
        write_run_record(folder, "report")
    artifacts.write_atomically(page, write_page(story, figures, reports).encode())


if __name__ == "__main__":
    main()
