"""The sandbox of code that nobody has reviewed, from inside: what it gets of the machine."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from stages.register import canary
from stages.register.registry import EVIDENCE
from stages.register.sandbox import kernel_rules, linux, run
from stages.register.sandbox.run import PROCESSES, Limits, run_in_sandbox
from stages.runtime.errors import InputError, MachineError
from tests.orchestra import until
from tests.register import attack

ATTACK, SECRET = Path(attack.__file__), "hush-hush-hush"
VARIABLES = ("GITHUB_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "DB_PASSWORD", "https_proxy", "MLFLOW_TRACKING_URI")
LIMITS = Limits(memory_bytes=9 << 30, timeout_s=120)
COUNTED = ("processes", "files in MiB")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock are Linux's")


@pytest.fixture
def target(registry, tmp_path, monkeypatch, root):  # noqa: ARG001  # the registry's database is one of the files
    """A machine with something to take: files, variables, servers, and this process."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(SECRET)
    monkeypatch.setenv("HOME", str(home))
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{os.environ.get(name, '')}?{SECRET}")
    other = subprocess.Popen(["sleep", "600"])  # of the same user, with the variables
    word = ctypes.create_string_buffer(SECRET.encode())
    servers = {
        "tcp": socket.create_server(("127.0.0.1", 0)),
        "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "unix": socket.socket(socket.AF_UNIX),
        "abstract": socket.socket(socket.AF_UNIX),
    }
    servers["udp"].bind(("127.0.0.1", 0))
    servers["unix"].bind(str(tmp_path / "socket"))
    servers["abstract"].bind(f"\0espalier-{os.getpid()}")
    for name in ("unix", "abstract"):
        servers[name].listen()
    yield {
        "files": [*map(str, (home, home / "token", root / "params.yaml", tmp_path / "mlflow.db")), "/etc/shadow"],
        "write": [str(root / "planted"), str(tmp_path / "mlflow.db"), f"{sys.prefix}/planted", "/usr/planted"],
        "secret": SECRET,
        "process": os.getpid(),
        "address": ctypes.addressof(word),
        "tcp": servers["tcp"].getsockname()[1],
        "udp": servers["udp"].getsockname()[1],
        "unix": str(tmp_path / "socket"),
        "abstract": f"espalier-{os.getpid()}",
        "seconds": f"600.{os.getpid()}",
        "forks": 10,
    }
    other.kill()
    other.wait()
    for server in servers.values():
        server.close()


@pytest.fixture
def isolate(monkeypatch, tmp_path):
    """Allow one isolation only; a machine whose system refuses it, whoever calls, skips the test."""

    def allow(isolation):
        if not ALLOWED[isolation]():
            pytest.skip(f"this machine allows no {isolation}")
        (tmp_path / "nothing.py").touch()
        monkeypatch.setattr(run, "ISOLATIONS", (isolation,))
        run_in_sandbox(tmp_path / "nothing.py", [], {}, LIMITS)

    return allow


def allows_namespaces():
    """Whether util-linux can do what the sandbox does, with or without a user's namespace."""
    command = ["unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--mount-proc"]
    made = (subprocess.run([*command, *more, "true"], check=False, capture_output=True) for more in ([], ["-Ur"]))
    return any(it.returncode == 0 for it in made)


def allows_landlock():
    """Whether the kernel has the rules that the sandbox needs."""
    try:
        version = linux.syscall("Landlock", kernel_rules.CREATE_RULESET, None, 0, kernel_rules.VERSION)
    except OSError:
        return False
    return version >= kernel_rules.MIN_VERSION


ALLOWED = {"namespaces": allows_namespaces, "landlock": allows_landlock, "limits": lambda: True}


def loot(found):
    """List the attempts that got something."""
    return {name: value for name, value in found.items() if value and name not in COUNTED}


def is_left(target):
    """Whether the process that the attack leaves behind still runs."""
    return any(target["seconds"] in " ".join(it.info["cmdline"] or []) for it in psutil.process_iter(["cmdline"]))


@linux_only
def test_the_code_of_a_version_gets_nothing(publish, target, tmp_path, isolate):
    """No file, variable, memory, server or process of the machine; what it writes and starts ends with the sandbox."""
    isolate("namespaces")
    target["files"] += [str(tmp_path / "published-1" / EVIDENCE), str(tmp_path)]

    def plant(folder):
        path = folder / "draw.py"
        attempt = f"base64.b64encode(json.dumps(attack(json.loads({json.dumps(target)!r}))).encode()).decode()"
        own = path.read_text().replace("_to_base64(image)}", attempt + "}")
        path.write_text(own + ATTACK.read_text().partition("if __name__")[0])

    folder = Path(publish(plant).source)
    found = json.loads(canary.draw_isolated(folder, [1])[1])

    assert loot(found) == {}
    assert found["processes"] == 10
    assert 0 < found["files in MiB"] <= 256
    assert not is_left(target)
    assert not (Path(sys.prefix) / "planted").exists()


def test_the_code_of_a_sound_version_draws_what_its_weights_draw(package, monkeypatch):
    """To the last bit; the seeds are drawn anew for each decision, and repeat it."""
    drawn, draw_isolated = {}, canary.draw_isolated

    def draw_once(folder, seeds, _variant):
        drawn.update(drawn or draw_isolated(folder, seeds))
        return {seed: drawn[seed] for seed in seeds}

    monkeypatch.setattr(canary, "draw_isolated", draw_once)
    first = canary.check_canary(package, 0.0)
    seeds = [int(seed) for seed in re.findall(r"\d+(?=[,\s])", first.partition("seeds ")[2].partition(" off")[0])]
    assert first == f"4 images from the seeds {', '.join(map(str, seeds))}, off by 0 levels; allowed: 0"
    assert len(set(seeds)) == 4

    assert canary.check_canary(package, 0.0, seeds) == first


@linux_only
def test_without_namespaces_landlock_closes_the_same(target, isolate, capsys):
    """The kernel's own rules take their place, and a warning names what they leave open."""
    isolate("landlock")
    found = json.loads(run_in_sandbox(ATTACK, [json.dumps(target)], {}, LIMITS))

    is_old = linux.syscall("Landlock", kernel_rules.CREATE_RULESET, None, 0, kernel_rules.VERSION) < 6
    assert loot(found) == ({"signal": "allowed"} if is_old else {})
    assert not is_left(target)
    assert "Warning: the code runs without namespaces (not tried); open are " in capsys.readouterr().err


def test_without_both_the_limits_remain(target, isolate, capsys):
    """Files and servers of this user are open, as the warning says; variables, processes and memory are bounded."""
    isolate("limits")
    found = json.loads(run_in_sandbox(ATTACK, [json.dumps({**target, "write": []})], {}, LIMITS))

    assert found[f"file {target['files'][1]}"] == SECRET
    assert (found["tcp"], found["permissions"]) == ("connected", "changed")
    assert found["environment"] == found["10 GiB of memory"] == ""
    if os.getuid():
        assert found["memory of the parent"] == ""
    assert not is_left(target)
    assert "open are every file of this user, the network" in capsys.readouterr().err


@linux_only
def test_a_machine_that_refuses_namespaces_is_named_in_the_warning():
    """A container refuses unshare; the code runs under the next isolation, and the line says why."""
    code = (
        "from pathlib import Path; from stages.register.sandbox import kernel_rules, run; kernel_rules.refuse_calls();"
        "print(run.run_in_sandbox(Path('hello.py'), [], {}, run.Limits(1 << 30, 60)))"
    )
    folder = Path(run.__file__).parents[3]
    program = folder / "hello.py"
    result = subprocess.run(
        [sys.executable, "-c", code.replace("hello.py", "/dev/null")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )

    assert not program.exists()
    assert (result.returncode, result.stdout) == (0, "b''\n")
    found = "Warning: the code runs without namespaces (namespaces: [Errno 1] unshare: Operation not permitted"
    assert result.stderr.startswith(found)
    assert "open are " in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("while True: pass", "it takes longer than 2 s"),
        ("import signal, os; os.fork(); os.fork(); signal.pause()", "it takes longer than 2 s"),
        (
            "import os, signal; os.fork(); os.fork(); x = bytearray(400 << 20); signal.pause()",
            "it takes more than 1024 MiB of memory",
        ),
        ("raise SystemExit('no ink \\x1b[31m left')", "no ink ?[31m left"),
        ("import os, signal; os.kill(os.getpid(), 11); os._exit(3)", "exit code "),
        ("import os; os.write(1, bytes(100 << 20)); os.write(1, b'more')", "OSError: [Errno 27] File too large"),
    ],
)
def test_a_program_that_fails_is_one_line(tmp_path, code, reason):
    """It is ended at its limits, with all of its children; the line holds its last message without escapes."""
    (tmp_path / "program.py").write_text(code)
    timeout_s = 2 if "longer" in reason else 60
    with pytest.raises(InputError, match=re.escape(reason)):
        run_in_sandbox(tmp_path / "program.py", [], {}, Limits(memory_bytes=1 << 30, timeout_s=timeout_s))


def test_a_program_that_fails_on_a_full_disk_is_not_blamed(tmp_path, monkeypatch):
    """It may have had no space for what it writes; with space, its own message stands."""
    (tmp_path / "program.py").write_text("raise SystemExit('no ink left')")
    with pytest.raises(InputError, match="no ink left"):
        run_in_sandbox(tmp_path / "program.py", [], {}, LIMITS)
    monkeypatch.setattr(run, "FREE_BYTES", 1 << 62)
    with pytest.raises(MachineError, match="No space left on device"):
        run_in_sandbox(tmp_path / "program.py", [], {}, LIMITS)


@linux_only
def test_a_fork_bomb_stays_in_the_sandbox(tmp_path, isolate):
    """The system refuses further processes, and ends them all with the sandbox."""
    isolate("namespaces")
    (tmp_path / "program.py").write_text(ATTACK.read_text().partition("if __name__")[0] + "print(fork_many(1000))")
    found = int(run_in_sandbox(tmp_path / "program.py", [], {}, LIMITS))

    assert 10 < found < PROCESSES


def test_the_sandbox_ends_with_its_caller(tmp_path):
    """A kill -9 of the process that promotes leaves no process of the version."""
    seconds = f"601.{os.getpid()}"
    (tmp_path / "program.py").write_text(f"import subprocess; subprocess.run(['sleep', '{seconds}'])")
    code = (
        "from pathlib import Path; from stages.register.sandbox.run import Limits, run_in_sandbox;"
        f"run_in_sandbox(Path({str(tmp_path / 'program.py')!r}), [], {{}}, Limits(1 << 30, 60))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # it leaves the sandbox's folder
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(run.__file__).parents[3], env=environment)
    assert until(lambda: is_left({"seconds": seconds}), 30)
    caller.send_signal(signal.SIGKILL)
    caller.wait()

    assert until(lambda: not is_left({"seconds": seconds}), 30)
