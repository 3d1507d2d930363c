"""`prefect`, whose server has no second page (V2), since that page asks a foreign host whatever its settings."""


def withhold_second_page() -> None:
    """Let servers of this process offer their first page only; PREFECT_SERVER_UI_V2_ENABLED decides where they open."""
    import prefect

    prefect.__ui_v2_static_path__ = prefect.__ui_v2_static_path__ / "withheld"  # a page without files is left out


def main() -> None:
    """Run the command line's command in this process."""
    withhold_second_page()

    from prefect.cli import app

    app()


if __name__ == "__main__":
    main()
