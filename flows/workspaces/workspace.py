"""A commit and overrides -> a place of their own for one run, which shares DVC's cache with all others."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from configobj import ConfigObj, ConfigObjError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.workspaces.overrides import Overrides
from flows.workspaces.repository import HOME_VARIABLE, Log, Repository, hash_json, hash_overrides, locked
from stages.params import load_params
from stages.runtime.errors import InputError, first_line
from stages.runtime.git import git_output

LONGEST = 1_000_000
"""Minutes: two years."""
LINKS = "reflink,hardlink,copy"
"""How outputs come out of the cache: links, where the file system has them, since data sets may be large."""


@dataclass(frozen=True)
class Stage:
    """One entry of dvc.yaml."""

    name: str
    params: tuple[str, ...]
    needs: tuple[str, ...]
    """Stages whose outputs it reads."""


@dataclass(frozen=True)
class Workspace:
    """Where one run works."""

    path: Path
    """The top of a checkout."""
    unsent: Path
    """Where records wait for MLflow."""
    commit: str | None = None
    """None where it is the user's own checkout, as it stands."""
    locks: Path | None = None
    """Where runs tell each other what they are at; None in the user's own checkout, which DVC guards."""
    has_remote: bool = False
    """Whether DVC has a remote that other machines share."""
    environment: dict[str, str] = field(default_factory=dict)
    """For every command in it, beside this process's."""

    @property
    def stages(self) -> list[Stage]:
        """Read the stages in order of flow.

        Raises:
            InputError: There is no dvc.yaml, or it lists no stages.
        """
        try:
            entries = YAML(typ="safe").load((self.path / "dvc.yaml").read_text())["stages"]
            makers = {out: name for name, entry in entries.items() for out in entry.get("outs", [])}
            return [
                Stage(name, tuple(entry.get("params", [])), tuple(_needs(entry.get("deps", []), makers)))
                for name, entry in entries.items()
            ]
        except (OSError, YAMLError, AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"dvc.yaml here lists no stages ({first_line(error)}); run the flow at the top of the project"
            ) from None

    def keys(self) -> dict[str, str]:
        """Name what each stage would make: by the commit, its params and what it needs. Equal names, equal outputs."""
        params = load_params(self.path / "params.yaml").model_dump(mode="json")
        found: dict[str, str] = {}
        for stage in self.stages:
            chosen = [params[key] for key in stage.params]
            found[stage.name] = hash_json([self.commit, stage.name, chosen, [found[it] for it in stage.needs]])
        return found

    def check_limits(self, limits: Mapping[str, float]) -> None:
        """Check minutes of stages.

        Raises:
            InputError: One is of no stage, or no number of minutes.
        """
        names = [stage.name for stage in self.stages]
        for name, minutes in limits.items():
            if name not in names:
                raise InputError(f"a limit is given for {name}, which is no stage; the stages are {', '.join(names)}")
            if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes <= LONGEST:
                raise InputError(f"{name}={minutes} is no number of minutes above 0, and at most {LONGEST}")

    @contextmanager
    def alone(self, key: str, log: Log) -> Iterator[None]:
        """Wait until no other run that shares our home is at the same work, then keep others from it."""
        if self.locks is None:
            yield
            return
        with locked(self.locks / f"{key}.lock", log):
            yield

    def remove(self) -> None:
        """Remove what is no longer needed, since the cache has the outputs; never a user's own checkout."""
        if self.commit is not None:
            gone = self.path.with_name(f".{self.path.name}.gone")  # a kill in the middle must not leave a half one
            shutil.rmtree(gone, ignore_errors=True)
            self.path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _needs(deps: list[str], makers: Mapping[str, str]) -> Iterator[str]:
    """Name the makers of what a stage reads; it may read one file of a folder."""
    needed = {maker for dep in deps for out, maker in makers.items() if Path(dep).is_relative_to(out)}
    yield from (maker for maker in dict.fromkeys(makers.values()) if maker in needed)


def current_checkout() -> Workspace:
    """Give the checkout that we are in, as it stands.

    Raises:
        InputError: It is none.
    """
    load_params(Path("params.yaml"))
    place = Workspace(Path.cwd(), Path("unsent").resolve())
    place.stages  # noqa: B018  # raises where this is no project
    return place


@contextmanager
def open_workspace(
    commit: str,
    overrides: Overrides,
    log: Log,
    environment: Mapping[str, str] | None = None,
    preset: str | None = None,
) -> Iterator[Workspace]:
    """Clone a commit, put the overrides into its params.yaml, and keep other runs out while the block lasts.

    The same commit, preset and overrides have the same workspace, so a run that was killed goes on from its
    checkpoints.

    Args:
        commit: Anything that git takes for one: HEAD, a branch, a tag, a hash.
        overrides: Of params.yaml as it stands in the commit.
        log: Takes lines for the log.
        environment: For every command in it, beside this process's.
        preset: Which of the commit's presets stands in place of its params.yaml.

    Raises:
        InputError: The commit cannot be had, or the overrides are not allowed.
    """
    repository = Repository.find()
    found = repository.resolve(commit, log)
    (params,) = repository.render(found, [overrides], preset)
    name = f"{found[:12]}-{hash_overrides(overrides, preset)}"
    path = repository.root / "workspaces" / name
    with locked(repository.root / "locks" / f"{name}.lock", log):
        if git_output(path, "--git-dir=.git", "rev-parse", "--verify", "HEAD") != found:
            repository.clone(found, path)
        (path / "params.yaml").write_bytes(params)
        yield Workspace(
            path,
            repository.root / "unsent",
            found,
            repository.root / "locks",
            has_remote=_configure(repository, path),
            environment=dict(environment or {}),
        )


def _configure(repository: Repository, path: Path) -> bool:
    """Let DVC use the shared cache, and the repository's remotes; say whether there is one."""
    origin = (Path(repository.origin) if repository.is_local else path).resolve() / ".dvc"
    if not (path / ".dvc").is_dir():
        raise InputError("the commit has no .dvc, so it is no project of DVC; make it one: dvc init")
    try:
        settings = ConfigObj(str(path / ".dvc" / "config"), list_values=False, encoding="utf-8")
        local = ConfigObj(
            str(origin / "config.local") if repository.is_local else None, list_values=False, encoding="utf-8"
        )
        odd = [name for config in (settings, local) for name in config.scalars]
    except (ConfigObjError, UnicodeDecodeError) as error:
        raise InputError(f"DVC's config cannot be read ({first_line(error)}); correct .dvc/config") from None
    if odd:
        raise InputError(f"DVC's config cannot be read ({odd[0]} is in no section); correct .dvc/config")
    settings.merge(local)
    cache = settings.get("cache", {})
    shared = (
        origin / cache.get("dir", "cache")
        if repository.is_local and not os.environ.get(HOME_VARIABLE)
        else repository.root / "cache"
    )
    local.setdefault("cache", {}).update({"dir": os.path.normpath(shared), "type": cache.get("type", LINKS)})
    for name, section in settings.items():
        url = section.get("url", "") if name.startswith(("'remote", "remote")) else ""
        if url and "://" not in url and repository.is_local:  # relative to the config file that it stands in
            local.setdefault(name, {})["url"] = os.path.normpath(origin / url)
    local.filename = str(path / ".dvc" / "config.local")
    local.write()
    return bool(settings.get("core", {}).get("remote"))
