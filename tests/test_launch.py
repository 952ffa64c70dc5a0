"""The lines of docs/several-macs.md, through MLX's own launcher; how long a machine waits for the others, and what
it takes for their numbers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import commands
import mlx.core as mx
import pytest
from mlx._distributed_utils import launch
from test_ranks import Group, finished, free_port, pair, said_by, words

from mlxtune.errors import UserError
from mlxtune.train import events, patience
from mlxtune.train.ranks import Ranks, Torn
from mlxtune.train.run_folder import RunFolder

RUN = Path("run")
BIN = Path(sys.executable).parent
PAGE = (commands.DOCS / "several-macs.md").read_text(encoding="utf-8")
# The lines of the page: the one that finds the machines, the one that launches.
FIND, LAUNCH = [
    step.command for step in commands.steps(commands.DOCS / "several-macs.md") if isinstance(step, commands.Line)
]

# What the machines do: as a shell that ssh opens, with little in its environment; their address is this machine's.
SSH = """#!/bin/bash
echo "$*" >>"{folder}/ssh.log"
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
host=$1; shift
exec env -i MAC="$host" HOME="$HOME" PATH="{folder}:/usr/bin:/bin" bash -c "$*"
"""
CAFFEINATE = '#!/bin/sh\necho "$MAC $*" >>"{folder}/caffeinate.log"\nexec sleep 600\n'
PMSET = """#!/bin/sh
[ "$2" = batt ] || exit 0
[ "$MAC" = mac2.local ] && echo "Now drawing from 'Battery Power'" && echo " -InternalBattery-0 (id=1) 55%; discharging"
exit 0
"""
MLXTUNE = """#!{python}
import types
from mlxtune import cli
from mlxtune.machine import surroundings
surroundings.sys = types.SimpleNamespace(platform="darwin")
cli.main()
"""


def written(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def test_the_lines_of_the_page_run_two_machines_that_stay_awake_and_tell_of_their_battery(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """As they stand there, in a shell; stand-ins for ssh and what macOS brings, and another port."""
    tools, here = tmp_path / "tools", tmp_path / "here"
    tools.mkdir()
    here.mkdir()
    texts = {
        "ssh": SSH,
        "caffeinate": CAFFEINATE,
        "pmset": PMSET,
        "mlxtune": MLXTUNE,
        "ipconfig": "#!/bin/sh\necho 127.0.0.1",
    }
    for name, text in texts.items():
        written(tools / name, text.replace("{folder}", str(tools)).replace("{python}", sys.executable))
    (here / "model").symlink_to(mlx_model)
    (here / "data").symlink_to(data)
    line = LAUNCH.replace("mlx.launch ", f"mlx.launch --starting-port {free_port()} ", 1)
    process = subprocess.Popen(
        [
            "bash",
            "-ec",
            f"{FIND}\n{line} --set 'train.sample_prompts=[Question number three, And four]' --set train.eval_every=0",
        ],
        cwd=here,
        env={**os.environ, "PATH": f"{tools}:{BIN}:{os.environ['PATH']}", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = finished(process)
    assert process.returncode == 0, said
    hosts = json.loads((here / "macs.json").read_text())["hosts"]
    assert [(host["ssh"], host["ips"]) for host in hosts] == [(f"mac{n}.local", ["127.0.0.1"]) for n in (1, 2)]
    assert "2 processes" in said and "Traceback" not in said, said
    found = events.read(here / "run")
    assert found[-1]["state"] == "finished" and found[-1]["step"] == 4
    assert [len(event["samples"]) for event in found if event["kind"] == "eval"] == [2, 2]
    awake = (tools / "caffeinate.log").read_text().splitlines()
    assert sorted(line.partition(" ")[0] for line in awake) == ["mac1.local", "mac2.local"]
    assert re.findall(r"note: process (\d), on \S+ this machine runs on its battery \(55%\)", said) == ["2"], said


def parsed(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What mlx.launch would start for a line, one entry a machine: (rank, host, python, cwd, files, env, command)."""
    started: list[Any] = []
    monkeypatch.setattr(launch, "_launch_with_io", lambda kind, arguments, verbose: started.extend(arguments))
    monkeypatch.setattr(sys, "argv", shlex.split(line.replace("$(which mlxtune)", "/bin/mlxtune")))
    monkeypatch.chdir(folder)
    launch.main()
    return [arguments for arguments, _ in started]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the launcher leaves the hostfile open
def test_the_launcher_passes_the_command_of_the_page_on_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the hostfile that the page writes by hand; options of ours that begin as its own do are not eaten."""
    by_hand = re.search(r"`(\[\{\"ssh\".*?), \.\.\.\]`", PAGE)
    assert by_hand
    hosts = [*json.loads(f"{by_hand[1]}]"), {"ssh": "127.0.0.1", "ips": ["192.168.1.11"]}]
    (tmp_path / "macs.json").write_text(json.dumps(hosts))
    ours = "train -c qlora --model model --data data --out run"
    one, two = parsed(f"{LAUNCH} -n 3 --env ours", tmp_path, monkeypatch)
    assert one[-1] == two[-1] == ["/bin/mlxtune", *ours.split(), "-n", "3", "--env", "ours"]
    assert (one[:2], two[:2]) == ((0, "mac1.local"), (1, "127.0.0.1"))
    addresses = json.loads(one[4]["MLX_HOSTFILE"])
    assert [[text.partition(":")[0] for text in own] for own in addresses] == [["192.168.1.10"], ["192.168.1.11"]]
    named = re.search(r"`(--env \S+)`", PAGE)
    assert named
    (one, _) = parsed(LAUNCH.replace(" -- ", f" {named[1]} -- "), tmp_path, monkeypatch)
    assert "HF_HOME=/Volumes/models" in one[5]
    with pytest.raises(SystemExit):  # names instead of addresses, which the ring does not take
        parsed(LAUNCH.replace("--hostfile macs.json", "--hosts mac1.local,mac2.local"), tmp_path, monkeypatch)
    assert "requires IPs" in capsys.readouterr().err


# Before the command: the second process stops in step 9, as under SIGSTOP from outside.
HANGS = """
import os, signal
from mlxtune.train import step
real = step.StepFunction.__call__
def call(self, number):
    if number == 9 and os.environ["MLX_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(self, number)
step.StepFunction.__call__ = call
"""


def test_a_process_that_hangs_ends_the_run_in_one_line_and_the_last_step_is_saved(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ("train.steps=2000", "train.rank_minutes=0.05", "train.save_every=0", "train.eval_every=0")
    first, second = pair(tmp_path, *words(mlx_model, data, run, *settings), code=HANGS)
    try:
        said = "".join(first.communicate(timeout=120))
        assert not RunFolder(run).is_training()
    finally:
        second.send_signal(signal.SIGCONT)
        first.kill()
        said_later = said_by([second])
    said += said_later
    assert "Traceback" not in said, said
    found = events.read(run)
    last = max(event["step"] for event in found if event["kind"] == "train")
    late = re.search(
        r"error: process 1 of 2 waited (\d+) seconds for the others in step (\d+): one hangs, sleeps", said
    )
    assert late and 2 < int(late[1]) < 30 and int(late[2]) == last + 1, said
    assert (found[-1]["kind"], found[-1]["state"]) == ("end", "failed")
    assert json.loads((run / f"checkpoints/step-{last:07d}/state.json").read_text())["state"]["step"] == last
    assert f"  Then: to go on: mlxtune train --resume --out {run}" in said


class Exits:
    """Stands for os._exit in the watching thread, which does nothing more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.status: list[int] = []
        self.said: list[str] = []
        self.happened = threading.Event()
        monkeypatch.setattr(patience.os, "_exit", self._exit)
        monkeypatch.setattr(patience, "POLL", 0.01)

    def _exit(self, status: int) -> None:
        self.status.append(status)
        self.happened.set()
        threading.Event().wait()  # for ever


def test_a_wait_may_last_as_long_as_own_work_and_earlier_waits_let_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    exits = Exits(monkeypatch)
    monkeypatch.setattr(patience, "OF_OWN", 20.0)
    own = patience.Patience()
    with own.ends_the_run(0.05, exits.said.append):
        time.sleep(0.05)  # its own work: 1 s is allowed
        with own.waiting():
            assert not exits.happened.wait(0.4)
        with own.waiting():  # no work of its own, but three times the wait before
            assert not exits.happened.wait(0.6)
        own._longest = 0.0
        with own.waiting():
            assert exits.happened.wait(10)
    assert exits.status == [2] and exits.said == ["0 seconds"]


def test_before_training_a_long_wait_is_told_of_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exits = Exits(monkeypatch)
    monkeypatch.setattr(patience, "NOTED", 0.2)
    monkeypatch.setattr(patience, "OF_OWN", 0.0)
    before = patience.Patience()
    with before.waiting():
        assert not exits.happened.wait(0.5)
    assert capsys.readouterr().err.count("of waiting for the other processes, which may still read the model") in (1, 2)
    assert patience.in_words(90) == "90 seconds" and patience.in_words(660) == "11 minutes"


class Others:
    """Stands for MLX's exchange between two ranks that have the same, as far as a test does not change it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.change = lambda array: array
        monkeypatch.setattr(mx.distributed, "all_sum", lambda array, group: array + array)
        monkeypatch.setattr(
            mx.distributed, "all_gather", lambda array, group: mx.concatenate([array, self.change(array)])
        )
        self.ranks = Ranks(Group(0, 2))


TREE = {"a": mx.arange(7, dtype=mx.float32), "b": {"c": mx.ones((2, 3), mx.bfloat16), "d": mx.zeros((), mx.uint64)}}


def test_sums_are_sums_whatever_the_types_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Others(monkeypatch).ranks
    for together in (8, 30, 1 << 25):  # bytes: several messages, and one for each type
        monkeypatch.setattr("mlxtune.train.ranks.TOGETHER", together)
        found = ranks.sum_tree({**TREE, "e": mx.full((3, 1), 0.5)})
        assert (found["a"] == 2 * TREE["a"]).all() and (found["b"]["c"] == 2).all() and found["b"]["d"].shape == ()
        assert found["e"].shape == (3, 1) and (found["e"] == 1).all()
    assert ranks.sum_numbers(1e8 + 0.25, 2) == [2e8 + 0.5, 4]
    assert ranks.highest(7) == 7


@pytest.mark.parametrize("exchange", ["sum_tree", "broadcast_tree"])
def test_a_sum_that_differs_in_one_bit_between_ranks_is_refused(exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch)
    getattr(others.ranks, exchange)(TREE)
    others.change = lambda array: array + mx.array([[1, 0]], array.dtype)  # their checksum; the message's number fits
    with pytest.raises(Torn, match="sums are not the same"):
        getattr(others.ranks, exchange)(TREE)


def test_an_earlier_message_in_place_of_the_one_due_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JACCL takes what lies in its buffer: the same numbers as now, of an exchange before."""
    others = Others(monkeypatch)
    sent: list[mx.array] = []

    def before(array: mx.array) -> mx.array:
        sent.append(array)
        return sent[0]

    others.change = before
    for exchange in (lambda: others.ranks.highest(3), lambda: others.ranks.sum_numbers(0.5)):
        sent.clear()
        exchange()
        with pytest.raises(Torn, match="not the one that was due"):
            exchange()


def test_a_message_that_jaccl_cannot_send_is_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no RuntimeError there: std::invalid_argument."""
    others = Others(monkeypatch)

    def refuse(array: mx.array) -> mx.array:
        raise ValueError("[jaccl] Send failed with error code 22")

    others.change = refuse
    with pytest.raises(Torn, match="Send failed with error code 22"):
        others.ranks.highest(1)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[ring] connection to a peer was lost"),
        RuntimeError("[jaccl] Recv failed with error code 22"),
        Torn("the sums are not the same on all of them"),
    ],
)
def test_a_lost_connection_is_one_clear_error_that_says_how_to_go_on(error: Exception) -> None:
    explained = Ranks(Group(0, 2)).explained
    with pytest.raises(UserError, match="connection to another of the 2 processes is gone") as raised, explained(RUN):
        raise error
    assert "--resume --out run" in raised.value.hint
    with pytest.raises(type(error)), Ranks().explained(RUN):  # alone it is another fault
        raise error
    with pytest.raises(RuntimeError, match="of a kernel"), explained(RUN):
        raise RuntimeError("of a kernel")


def test_processes_that_do_not_find_each_other_are_told_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("[ring] Couldn't connect (error: 61)")

    monkeypatch.setattr(mx.distributed, "init", init)
    with pytest.raises(UserError, match=r"do not find each other \(\[ring\] Couldn't connect") as raised:
        Ranks.here()
    assert "IP address" in raised.value.hint and "firewall" in raised.value.hint


def test_one_of_several_that_finds_no_other_does_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the backend that was asked for is not there: MLX makes a group of one, without a word."""
    monkeypatch.setattr(mx.distributed, "init", lambda: Group(0, 1))
    monkeypatch.setenv("MLX_RANK", "0")  # a launch on one machine
    assert Ranks.here().size == 1
    monkeypatch.setenv("MLX_RANK", "1")
    with pytest.raises(UserError, match="started as one of several, but MLX found no other"):
        Ranks.here()
