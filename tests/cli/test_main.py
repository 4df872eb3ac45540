"""Exit codes, one-line errors, clean standard output, and which settings reach the library."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tamis
from control_c import heed_control_c
from tamis.cli.main import main, run
from tamis.errors import BadRow, InvalidInput
from tamis.settings import SelectSettings
from tiny_run import TinyRun, make_run

ARGUMENTS = ["--model", "m", "--pool", "p.jsonl", "--target", "t.jsonl"]


def tamis_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tamis", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=240,
    )


@dataclass
class FakeSelection:
    """What the library returns, as far as the command line looks at it."""

    out: Path
    warnings: tuple[str, ...] = ("one source gives 90 % of the rows",)

    def summary(self) -> dict[str, Any]:
        return {"selected_rows": 3, "scores": self.out / "scores.parquet", "warnings": list(self.warnings)}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[SelectSettings]:
    """Replace the library by one that notes the settings, prints where it should not, and reports progress."""
    settings_seen: list[SelectSettings] = []

    def select_from_settings(settings: SelectSettings, *, progress: Any) -> FakeSelection:
        settings_seen.append(settings)
        print("a library that prints")  # noqa: T201  # what the command line has to keep off standard output
        with progress.stage("gradients (pool)", 10, "rows") as advance:
            advance(10)
        return FakeSelection(tmp_path)

    install(monkeypatch, select_from_settings=select_from_settings)
    return settings_seen


def install(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    module = types.ModuleType("tamis.api")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "tamis.api", module)
    monkeypatch.setattr(tamis, "api", module, raising=False)


def raising(error: BaseException) -> Callable[..., Any]:
    def select_from_settings(settings: SelectSettings, *, progress: Any) -> Any:
        raise error

    return select_from_settings


# --- in this process: which settings arrive ------------------------------------------------------------------------


def test_flags_arrive_as_settings(seen: list[SelectSettings]) -> None:
    words = "--method less --set lora_rank=4 --set form=adam --budget 200k-tokens --share t=2 --drop-leaks --no-report"
    assert run(["select", *ARGUMENTS, *words.split()]) == 0
    (settings,) = seen
    assert settings == SelectSettings(
        model="m",
        pool=("p.jsonl",),
        target=("t.jsonl",),
        method="less",
        set={"lora_rank": 4, "form": "adam"},
        budget="200k-tokens",
        share={"t": 2.0},
        drop_leaks=True,
        report=False,
    )


def test_several_values_may_follow_pool_and_target(seen: list[SelectSettings]) -> None:
    line = "select --model m --pool a.jsonl b.jsonl --seed 1 --target x=c.jsonl d.jsonl --pool e.jsonl"
    assert run(line.split()) == 0
    assert seen[0].pool == ("a.jsonl", "b.jsonl", "e.jsonl")
    assert seen[0].target == ("x=c.jsonl", "d.jsonl")
    assert seen[0].seed == 1


def test_several_pairs_may_follow_a_flag_and_a_switch_takes_none(seen: list[SelectSettings]) -> None:
    line = "--target u.jsonl --share t=2 u=3 --set a=1 b=x --quiet --set c=[1]"
    assert run(["select", *ARGUMENTS, *line.split()]) == 0
    assert (dict(seen[0].share), dict(seen[0].set)) == ({"t": 2.0, "u": 3.0}, {"a": 1, "b": "x", "c": [1]})


@pytest.mark.parametrize("verb", ["select", "doctor", "plan", "proxy", "train", "compare", "attribute", "verify"])
def test_help_begins_with_what_a_verb_must_be_given_and_shows_no_value_of_a_switch(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    first = " ".join(printed.split("[OPTIONS]")[0].split())
    needed = ["--run RUN"] if verb in ("attribute", "verify") else ["--model MODEL", "--pool POOL"]
    assert first.startswith(f"Usage: tamis {verb} ") and all(flag in first for flag in needed)
    assert ("--target TARGET" in first) is (verb not in ("doctor", "plan", "proxy"))
    assert "<bool>" not in printed


def test_only_typed_flags_override_the_file(seen: list[SelectSettings], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: m\npool: p.jsonl\ntarget: t.jsonl\nseed: 5\nbudget: 7\ndrop_leaks: true\n")
    assert run(["select", "--config", str(config), "--seed", "0", "--keep-leaks"]) == 0
    assert (seen[0].seed, seen[0].budget, seen[0].drop_leaks) == (0, "7", False)


def test_json_is_one_object_alone_on_standard_output(
    seen: list[SelectSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["select", *ARGUMENTS, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["selected_rows"] == 3
    assert captured.out.count("\n") == 1
    assert "a library that prints" in captured.err


def test_quiet_prints_warnings_and_nothing_else(seen: list[SelectSettings], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["select", *ARGUMENTS, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "warning: one source gives 90 % of the rows" in captured.err


def test_the_summary_shows_counts_and_paths(seen: list[SelectSettings], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["select", *ARGUMENTS]) == 0
    out = capsys.readouterr().out
    assert "selected rows" in out and "scores.parquet" in out


def test_other_ranks_print_nothing(
    seen: list[SelectSettings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(["select", *ARGUMENTS, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "warning" not in captured.err


# --- in this process: errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            BadRow("content is null", file="p.jsonl", row=3, field="messages"),
            "p.jsonl, row 3 (0-based), field 'messages'",
        ),
        (InvalidInput("first\nsecond"), "tamis: first second"),
        (OSError(28, "No space left on device", "store/shard-0"), "store/shard-0: No space left on device"),
        (PermissionError(13, "Permission denied", "out"), "out: Permission denied"),
    ],
)
def test_expected_errors_are_one_line_and_exit_2(
    error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, select_from_settings=raising(error))
    assert run(["select", *ARGUMENTS]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err and captured.err.count("\n") == 1


def test_markup_and_control_characters_in_an_error_are_shown_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, select_from_settings=raising(InvalidInput("row says [bold]x[/bold] \x1b[31mred")))
    assert run(["select", *ARGUMENTS]) == 2
    err = capsys.readouterr().err
    assert "[bold]x[/bold]" in err and "\x1b" not in err


def test_debug_adds_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, select_from_settings=raising(InvalidInput("wrong")))
    monkeypatch.setenv("TAMIS_DEBUG", "1")
    assert run(["select", *ARGUMENTS]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.rstrip().endswith("tamis: wrong")


def test_our_own_faults_are_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, select_from_settings=raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        run(["select", *ARGUMENTS])


def test_an_interrupt_exits_130_and_says_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, select_from_settings=raising(KeyboardInterrupt()))
    typed = ["select", *ARGUMENTS, "--out", "my run"]
    assert run(typed) == 130
    err = capsys.readouterr().err
    assert "run the same command again" in err
    assert shlex.join(["tamis", *typed]) in err and err.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("select --polo x", "--polo"),
        ("select --seed many", "'--seed'"),
        ("selct", "'selct'"),
        ("select --pool a --target b", "model is missing or empty: pass --model"),
        ("select --model m --pool p --target t --method tracn", "did you mean 'tracin'?"),
        ("select --model m --pool p --target t --set lr", "--set lr: expected NAME=VALUE"),
        ("select --config none.yaml", "none.yaml: No such file"),
        ("plan --model m --pool p --budget nothing", "budget"),
        ("doctor --model m --pool p --check-rows 1", "check_rows=1: expected at least 2"),
        ("train --model m --pool p --target t", "expected one of them, got neither; pass --steps or --epochs"),
        ("train --model m --pool p --target t --steps 5 --set keep=3", "keep belongs to every method; write --keep 3"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    typed: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(typed.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err and captured.err.count("\n") == 1


# --- the real command -----------------------------------------------------------------------------------------------


def test_help_version_and_wrong_settings_do_not_import_pytorch() -> None:
    program = (
        "import sys\nfrom tamis.cli.main import run\n"
        "codes = [run(['--help']), run(['--version']), run(['select', '--help']), run(['train', '--help']),\n"
        "         run('select --model m --pool p --target t --method x'.split()),\n"
        "         run('train --model m --pool p --target t --steps 5 --method x'.split())]\n"
        "assert codes == [0, 0, 0, 0, 2, 2], codes\n"
        "heavy = [m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"tamis {tamis.__version__}" in done.stdout


def test_one_process_of_several_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("a page", encoding="utf-8")
    for rank, written in (("1", False), ("0", True)):  # two would rename one unfinished file
        monkeypatch.setenv("RANK", rank)
        assert run(["report", str(tmp_path), "--out", str(tmp_path / "copy.html")]) == 0
        assert (tmp_path / "copy.html").exists() == written


def test_the_command_exits_2_with_one_line_for_a_missing_file() -> None:
    done = tamis_command("select", "--model", "nowhere/at/all", "--pool", "none.jsonl", "--target", "none.jsonl")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("tamis: ")
    assert "Traceback" not in done.stderr


# A verb that fails in some processes while the others wait for them.
FAILS_IN_SOME = """
import os, sys, types
from tamis.errors import InvalidInput
from tamis.model.processes import barrier
module = types.ModuleType("tamis.api")
def select_from_settings(settings, *, progress):
    barrier()
    if os.environ["RANK"] in os.environ["FAILING"]:
        raise InvalidInput("row 3 is not for rank " + os.environ["FAILING"])
    barrier()
module.select_from_settings = select_from_settings
import tamis
tamis.api = sys.modules["tamis.api"] = module
from tamis.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1", "01"])
def test_an_error_of_one_process_or_of_all_is_said_once_and_ends_them_all(tmp_path: Path, failing: str) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS_IN_SOME, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [*launcher, str(script), "select", *ARGUMENTS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "FAILING": failing},
        timeout=240,
    )
    assert done.returncode == 1, done.stderr  # the launcher's
    said = [line for line in done.stderr.splitlines() if line.startswith("tamis")]
    rank = "" if "0" in failing else " (rank 1)"
    assert said[0] == f"tamis{rank}: row 3 is not for rank {failing}"
    assert all("FAILED" in line for line in said[1:]), said  # the launcher's, too
    assert "by peer" not in done.stderr  # of the process that waited


def test_a_process_that_has_lost_another_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("tamis.cli.main.time.sleep", waited.append)
    fake = types.ModuleType("tamis.api")

    def select_from_settings(settings: SelectSettings, *, progress: Any) -> None:
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. GLHF!")

    fake.select_from_settings = select_from_settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tamis.api", fake)
    monkeypatch.setattr(tamis, "api", fake, raising=False)
    assert run(["select", *ARGUMENTS]) == 2
    assert capsys.readouterr().err.startswith("tamis: another process of this run has ended; its own message, or the ")
    assert len(waited) == 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"))


def test_a_run_can_be_repeated_from_its_own_settings(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "again"
    words = ["--model", str(tiny.model), "--pool", str(tiny.pool), "--target", f"sums={tiny.target}"]
    assert run(["select", *words, "--budget", "10", "--method", "bm25", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["selected_rows"] == 10
    kept = (out / "selected.jsonl").read_bytes(), (out / "scores.parquet").read_bytes()
    assert run(["select", "--config", str(out / "run.yaml"), "--out", str(other), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert ((other / "selected.jsonl").read_bytes(), (other / "scores.parquet").read_bytes()) == kept


def test_control_c_during_work_exits_130(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    program = (
        "import sys, time, types, pathlib\n"
        "module = types.ModuleType('tamis.api')\n"
        "def select_from_settings(settings, *, progress):\n"
        f"    pathlib.Path({str(ready)!r}).touch()\n"
        # Short ones: a signal between Python's last look and the system's sleep is heeded only after it.
        "    for _ in range(6000): time.sleep(0.01)\n"
        "module.select_from_settings = select_from_settings\n"
        "import tamis\n"
        "tamis.api = sys.modules['tamis.api'] = module\n"
        "from tamis.cli.main import main\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "select", *ARGUMENTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_control_c,
    )
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    assert "run the same command again" in err


@pytest.mark.parametrize(("set_by_user", "expected"), [(None, "1"), ("0", "0")])
def test_the_command_asks_for_huge_pages_unless_the_user_says_otherwise(
    set_by_user: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")  # put back afterwards, whatever the command does to it
    if set_by_user is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    else:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", set_by_user)
    monkeypatch.setattr("sys.argv", ["tamis", "--version"])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 0
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected
