"""The TPU scripts against a stand-in for gcloud that records its calls and plays the VM in a folder of its own."""

import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "tpu_scripts"
FIVE = ("create", "setup", "run", "resume", "delete")

FAKE_GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
world = pathlib.Path(os.environ["FAKE_WORLD"])
with open(world / "calls.jsonl", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
verb, rest = sys.argv[4], sys.argv[5:]
if verb == "describe":
    print((world / "state").read_text())
if verb == "scp":
    shutil.copy(rest[0], world / "home" / rest[1].partition(":")[2])
if verb == "ssh":
    command = next(a for a in rest if a.startswith("--command=")).partition("=")[2]
    sys.exit(subprocess.run(["bash", "-c", command], cwd=world / "home").returncode)
"""

FAKE_KGREC = """#!{python}
import pathlib, sys, time
print("kgrec", sys.argv[1:], flush=True)
while pathlib.Path("hold").exists():
    time.sleep(0.02)
sys.exit(3 if "fail" in sys.argv else 0)
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("{python}", sys.executable))
    path.chmod(0o755)


class World:
    """A PATH with the stand-in, a VM's home folder, and the record of calls."""

    def __init__(self, folder):
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir()
        (folder / "state").write_text("READY")
        executable(folder / "bin" / "gcloud", FAKE_GCLOUD)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
        self.env |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_WORLD": str(folder)}

    def install(self):
        """What setup.sh leaves on the VM, with a stand-in for kgrec."""
        shutil.copytree(SCRIPTS, self.home / "kgrec" / "tpu_scripts")
        executable(self.home / "kgrec" / ".venv" / "bin" / "kgrec", FAKE_KGREC)

    def start(self, script, *arguments):
        return subprocess.Popen(["bash", str(SCRIPTS / f"{script}.sh"), *arguments], env=self.env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def __call__(self, script, *arguments):
        process = self.start(script, *arguments)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_create_names_type_and_software(world):
    place = ("--project", "p", "--zone", "z")
    assert world("create", *place)[0] == 0
    assert world("create", *place, "--type", "v6e-1", "--name", "mine", "--spot")[0] == 0
    world.env |= {"TPU_TYPE": "v4-8", "TPU_VERSION": "other", "TPU_PROJECT": "q", "TPU_NAME": "n"}
    assert world("create")[0] == 0
    head = ["compute", "tpus", "tpu-vm", "create"]
    assert world.calls == [
        [*head, "kgrec", "--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite", "--project=p", "--zone=z"],
        [*head, "mine", "--accelerator-type=v6e-1", "--version=v2-alpha-tpuv6e", "--spot", "--project=p", "--zone=z"],
        [*head, "n", "--accelerator-type=v4-8", "--version=other", "--project=q"]]


def test_dry_run_prints_the_commands_and_runs_none(world):
    world.env["PATH"] = os.environ["PATH"].replace(str(world.folder / "bin"), "")
    printed = {}
    for script in FIVE:
        rest = ("--", "run", "configs/default.py", "--data.path", "a b") if script == "run" else ()
        code, printed[script], err = world(script, "--dry-run", "--zone", "z", *rest)
        assert (code, err) == (0, "")
    assert not world.calls
    assert {script: [line.split()[4] for line in text.splitlines()] for script, text in printed.items()} == {
        "create": ["create"], "setup": ["scp", "ssh", "ssh"], "run": ["ssh"], "resume": ["describe", "ssh"],
        "delete": ["delete"]}
    assert all(line.startswith("gcloud compute tpus tpu-vm ") and "--zone=z" in line
               for text in printed.values() for line in text.splitlines())


def test_printed_commands_are_the_ones_that_run(world):
    """What --dry-run prints, pasted into a shell, calls gcloud with the same arguments."""
    world.install()
    arguments = ("--zone", "z", "--", "run", "it's", "a b", "$HOME", "--data.path=*")
    _, printed, _ = world("run", "--dry-run", *arguments)
    assert world("run", *arguments)[0] == 0
    (world.home / "kgrec" / "last" / "pid").unlink()
    subprocess.run(["bash", "-c", printed], env=world.env, check=True, capture_output=True)
    assert world.calls[0] == world.calls[1]


def test_setup_copies_what_is_needed_and_installs_it(world):
    """The VM's pip is played: the archive's content and the order of the steps are real."""
    executable(world.home / "kgrec" / ".venv" / "bin" / "python", """#!/bin/sh
echo "python $*" >> "$FAKE_WORLD/steps"
""")
    (world.home / "kgrec" / "last").mkdir()
    code, _, err = world("setup", "--zone", "z")
    assert code == 0, err
    installed = world.home / "kgrec"
    assert (installed / "kgrec_jax" / "errors.py").is_file() and (installed / "tpu_scripts" / "on_vm.sh").is_file()
    assert not list(installed.rglob("__pycache__")) and not (installed / "tests").exists()
    assert (installed / "last").is_dir()  # an earlier run is not lost
    steps = (world.folder / "steps").read_text().splitlines()
    assert steps[0] == "python -m pip install --quiet -e .[tpu]" and "device_count" in steps[1]


def test_run_hands_its_arguments_on_and_ends_with_the_runs_status(world):
    world.install()
    code, out, err = world("run", "--zone", "z", "--", "run", "a b", "it's", "$HOME")
    assert (code, err) == (0, "") and out == "kgrec ['run', 'a b', \"it's\", '$HOME']\n"
    assert world("run", "--", "fail")[0] == 3


def test_run_survives_the_terminal_and_resume_follows_it(world):
    world.install()
    hold = world.home / "kgrec" / "hold"
    hold.touch()
    following = world.start("run", "--", "quickstart")
    assert following.stdout.readline() == "kgrec ['quickstart']\n"
    os.killpg(following.pid, signal.SIGINT)  # Ctrl-C at the terminal
    following.communicate(timeout=20)
    code, _, err = world("run", "--", "quickstart")
    assert code == 2 and "still going" in err and "resume.sh" in err
    again = world.start("resume")
    assert again.stdout.readline() == "kgrec ['quickstart']\n"
    hold.unlink()
    again.communicate(timeout=20)
    assert again.returncode == 0


def test_resume_starts_the_same_command_after_a_kill(world):
    world.install()
    hold = world.home / "kgrec" / "hold"
    hold.touch()
    following = world.start("run", "--", "run", "a b")
    assert following.stdout.readline() == "kgrec ['run', 'a b']\n"
    os.killpg(int((world.home / "kgrec" / "last" / "pid").read_text()), signal.SIGKILL)
    _, err = following.communicate(timeout=20)
    assert following.returncode == 2 and "without a status" in err
    hold.unlink()
    (world.folder / "state").write_text("STOPPED")
    code, out, err = world("resume")
    assert (code, out) == (0, "kgrec ['run', 'a b']\n"), err
    assert [call[3] for call in world.calls] == ["ssh", "describe", "start", "ssh"]


@pytest.mark.parametrize("state, message", [("PREEMPTED", "disk is gone"), ("CREATING", "try again")])
def test_resume_without_a_usable_vm(world, state, message):
    (world.folder / "state").write_text(state)
    code, _, err = world("resume")
    assert code == 2 and message in err and state in err


def test_resume_without_an_earlier_run(world):
    world.install()
    code, _, err = world("resume")
    assert code == 2 and "no earlier run" in err


def test_delete_asks_unless_told_not_to(world):
    assert world("delete")[0] == 0 and world("delete", "--yes")[0] == 0
    assert [call[3:] for call in world.calls] == [["delete", "kgrec"], ["delete", "kgrec", "--quiet"]]


@pytest.mark.parametrize("arguments, message", [
    (("create", "--zone"), "found --zone without a value"), (("create", "-x"), "found -x, expected a flag"),
    (("create", "--type", "v9-1"), "accelerator type 'v9-1'"), (("create", "--name", "A B"), "found the name 'A B'"),
    (("run",), "found nothing after --"), (("delete", "--", "x"), "found x after --")])
def test_bad_flags_are_one_line(world, arguments, message):
    code, _, err = world(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and not world.calls


def test_failures_of_gcloud_pass_through(world):
    executable(world.folder / "bin" / "gcloud", "#!/bin/sh\necho 'no quota' >&2\nexit 7\n")
    for script in ("create", "setup", "resume", "delete"):
        code, _, err = world(script)
        assert code == 7 and "no quota" in err


def test_without_gcloud(world, tmp_path):
    for name in ("bash", "dirname", "sed", "cat"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / name).symlink_to(shutil.which(name))
    world.env["PATH"] = str(tmp_path / "bare")
    code, _, err = world("create")
    assert code == 2 and "found no gcloud" in err


@pytest.mark.parametrize("script", FIVE)
def test_help_and_mode(world, script):
    code, out, _ = world(script, "--help")
    assert code == 0 and out.startswith(f"{script}.sh [FLAGS]") and "--dry-run" in out
    assert (SCRIPTS / f"{script}.sh").stat().st_mode & stat.S_IXUSR


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck, which is not installed here")
    files = sorted(str(p) for p in SCRIPTS.glob("*.sh"))
    done = subprocess.run(["shellcheck", "-x", *files], capture_output=True, text=True, cwd=SCRIPTS)
    assert done.returncode == 0, done.stdout
