"""A config file of DVC -> its sections, or one line that says why it cannot be read."""

from pathlib import Path

from configobj import ConfigObj, ConfigObjError

from stages.runtime.errors import InputError, first_line


def read_dvc_config(path: Path | None) -> ConfigObj:
    """Read a config of DVC; a file that does not exist, or None, has no sections.

    Raises:
        InputError: It is no text, has another form, or a value in no section.
    """
    try:
        config = ConfigObj(str(path) if path else None, list_values=False, encoding="utf-8")
        loose = [f"{name} is in no section" for name in config.scalars]
    except (ConfigObjError, UnicodeDecodeError) as error:
        loose = [first_line(error)]
    if loose:
        raise InputError(f"DVC's config cannot be read ({loose[0]}); correct .dvc/config")
    return config
