"""A warm process is what `python script.py` would be, as far as warm_python.py says."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tqdm

from conftest import WARM, environment_of, run_command
from warm_python import WarmPython

SCRIPTS = {
    "words on both streams": "import sys; print('said', sys.argv[1:]); print('wrong', file=sys.stderr)",
    "a status": "import sys; print('said'); sys.exit(75)",
    "a status above a byte": "import sys; sys.exit(256 + 7)",
    "no status": "import sys; sys.exit()",
    "words for a status": "import sys; sys.exit('words')",
    "a signal": "import os; os.kill(os.getpid(), 15)",
    "an end without ceremony": "import os; print('lost'); os._exit(3)",
    "an interrupt": "raise KeyboardInterrupt",
    "where it is": "import os, sys; print(os.getcwd(), sys.path[0], sys.stdin.read(), sys.stdout.isatty())",
    "main": "import __main__; print(__main__.__file__, __name__, __main__.x if (x := 5) else 0)",
    "a neighbour": "import neighbour; print(neighbour.__name__)",
    "a package": "import sys, package; print(package.__file__, sys.path[:2])",
    "threads and functions of the end": (
        "import atexit, threading, time; atexit.register(print, 'third')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('second'))).start()\n"
        "print('first')\n"
    ),
    "a child process": (
        "import multiprocessing\n"
        "def work(): print('child')\n"
        "if __name__ == '__main__': multiprocessing.get_context('fork').Process(target=work).start()\n"
    ),
    "the environment": "import os; print(os.environ['HOME'], os.environ['RANK'], os.environ.get('PYTEST_XDIST'))",
    "open files": "import os; print([f for f in os.listdir('/proc/self/fd') if os.path.exists(f'/dev/fd/{f}')])",
    "signals": "import signal; print([signal.getsignal(s) for s in (2, 15, 13, 17)], signal.pthread_sigmask(0, []))",
    "its group": "import os; print(os.getpgid(0) == os.getsid(0) == os.getpid())",
    "torch": "import torch; print(torch.get_num_threads(), torch.get_default_dtype())",
}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "packages").mkdir()
    for path in ("neighbour.py", "packages/package.py"):
        (tmp_path / path).touch()
    return tmp_path / "script.py"


@pytest.mark.parametrize("source", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_a_warm_process_does_what_python_does(script, tmp_path, source):
    script.write_text(source)
    environment = environment_of() | {"RANK": "3", "PYTHONPATH": str(tmp_path / "packages")}
    ours = WARM.run(script, "a", "b c", cwd=tmp_path, environment=environment, timeout_s=60)
    right = subprocess.run(
        [sys.executable, script, "a", "b c"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert (ours.returncode, ours.stdout) == (right.returncode, right.stdout)
    assert ours.stderr.splitlines()[-1:] == right.stderr.splitlines()[-1:]


def test_an_error_is_a_traceback_and_status_1(script, tmp_path):
    script.write_text("print('before')\nraise ValueError('wrong')")
    run = WARM.run(script, cwd=tmp_path, environment=environment_of(), timeout_s=60)
    assert (run.returncode, run.stdout) == (1, "before\n")
    assert run.stderr.startswith("Traceback")
    assert run.stderr.endswith(
        f"File \"{script}\", line 2, in <module>\n    raise ValueError('wrong')\nValueError: wrong\n"
    )


def test_two_processes_draw_other_numbers_where_python_would(script, tmp_path):
    script.write_text("import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())")
    runs = [WARM.run(script, cwd=tmp_path, environment=environment_of(), timeout_s=60) for _ in range(2)]
    first, second = (run.stdout.split() for run in runs)
    assert len({*first, *second}) == 6


def test_a_process_can_be_watched_signalled_and_waited_for(script, tmp_path):
    script.write_text("import time; print('up', flush=True); time.sleep(60)")
    with WARM.start(script, cwd=tmp_path, environment=environment_of()) as process:
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=0.5)
        assert os.getpgid(process.pid) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10) == ("up\n", "")
        assert process.returncode == process.poll() == -signal.SIGTERM
        process.send_signal(signal.SIGKILL)  # to nobody


def test_what_runs_too_long_is_ended(script, tmp_path):
    script.write_text("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        WARM.run(script, cwd=tmp_path, environment=environment_of(), timeout_s=1)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


@pytest.mark.parametrize("changed", [{"CXX": "another"}, {"TORCH_LOGS": "recompiles"}, {"OMP_NUM_THREADS": "2"}])
def test_an_environment_that_imports_may_read_needs_a_python_of_its_own(changed):
    assert WARM.fits(environment_of())
    assert WARM.fits(environment_of() | {"RANK": "0", "MASTER_PORT": "1"})
    assert not WARM.fits(environment_of() | changed)


def test_the_server_has_imported_nothing_of_the_project(script, tmp_path):
    script.write_text("import sys; print([getattr(m, '__file__', 0) for m in list(sys.modules.values())])")
    run = WARM.run(script, cwd=tmp_path, environment=environment_of(), timeout_s=60)
    assert "site-packages/torch/__init__.py" in run.stdout
    assert "/EqM/" not in run.stdout


def test_the_server_finds_packages_that_only_pythonpath_names(script, tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    (packages / "tqdm").symlink_to(Path(tqdm.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(packages), prepend=os.pathsep)
    script.write_text("import sys, tqdm; print(tqdm.__file__, sys.path.count(sys.argv[1]))")
    warm = WarmPython()
    try:
        run = warm.run(script, packages, cwd=tmp_path, environment=environment_of(), timeout_s=60)
    finally:
        warm.close()
    assert run.stdout == f"{packages}/tqdm/__init__.py 1\n"


@pytest.mark.slow
def test_a_server_that_was_killed_is_started_again(script, tmp_path):
    script.write_text("import os; print(os.getppid())")
    warm, servers = WarmPython(), []
    for _ in range(2):
        run = warm.run(script, cwd=tmp_path, environment=warm.environment, timeout_s=60)
        servers.append(int(run.stdout))
        os.kill(servers[-1], signal.SIGKILL)
        while ") Z " not in Path(f"/proc/{servers[-1]}/stat").read_text():
            time.sleep(0.01)
    warm.close()
    assert len(set(servers)) == 2


@pytest.mark.slow
def test_the_server_ends_with_the_tests(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, {tests!r}); from pathlib import Path; from warm_python import WarmPython\n"
        "warm = WarmPython(); Path('x.py').write_text('import os; print(os.getppid())')\n"
        "run = warm.run(Path('x.py').resolve(), cwd='.', environment=warm.environment, timeout_s=60)\n"
        "print(run.stdout, flush=True); os._exit(0)\n"
    )
    run = run_command(sys.executable, "-c", code.format(tests=str(Path(__file__).parent)), cwd=tmp_path)
    server, end = Path("/proc", run.stdout.strip()), time.monotonic() + 20
    while server.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not server.exists()


def test_a_server_that_ends_in_its_imports_fits_nothing(tmp_path, monkeypatch):
    (tmp_path / "server.py").write_text("raise SystemExit(1)\n")
    monkeypatch.setattr("warm_python.SERVER", tmp_path / "server.py")
    without = WarmPython()
    assert not without.fits(environment_of())
    without.close()
