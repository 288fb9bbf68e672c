"""The `vlcp` command: run, plan, status, report and doctor."""

import errno
import json
import sys
import time
from collections import Counter
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlcp_dist import config
from vlcp_dist.errors import ConfigError, InputError, StageFailed, Stopped
from vlcp_dist.interrupt import Interrupt, Terminated

if TYPE_CHECKING:
    from vlcp_dist.data import storage
    from vlcp_dist.status import StageStatus

app = typer.Typer(
    help="Distil a large labelled image dataset into a tiny synthetic one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# What the storage may refuse at any moment, and a user can mend.
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
ConfigPath = Annotated[str, typer.Option("--config", "-c", help="the YAML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as ipc=[10,50] root=runs/a")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable")]


@app.command()
def run(
    config_path: ConfigPath,
    overrides: Overrides = None,
    *,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="this stage alone; may be given several times")
    ] = None,
    max_units: Annotated[
        int | None, typer.Option(min=1, help="at most so many units of each stage, as a trial")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="do units again that hold failed samples")
    ] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="show the whole configuration and stop")] = False,
    progress_interval: Annotated[
        float,
        typer.Option(min=0, help="seconds between lines where there is no terminal; 0: a line per unit"),
    ] = 10.0,
) -> None:
    """Do everything that is not done yet, then write the report.

    Exit code 0: all that was asked for is done. 1: something failed. 2: a bad configuration. 130: Ctrl-C, which
    finishes the units in flight when pressed once and stops at once when pressed again. 143: SIGTERM.
    """
    cfg = config.load(config_path, overrides)
    if print_config:
        print(json.dumps(cfg.model_dump(mode="json"), indent=2))
        return
    from vlcp_dist import pipeline, report
    from vlcp_dist.data import storage
    from vlcp_dist.engine.progress import Progress, duration

    began = time.monotonic()
    again = "what is done stays done: the same command goes on from here"
    left = []
    try:
        with Interrupt() as interrupt:
            for name, variant in config.variants(cfg).items():
                if name:
                    print(f"== {name}")
                states = pipeline.run(
                    variant, Progress(interval=progress_interval, file=storage.locate(cfg.root) / "progress.json"),
                    only=only or (), max_units=max_units, retry_failed=retry_failed, interrupt=interrupt,
                )  # fmt: skip
                page = report.write(variant, states, name)
                _print_results(report.results(states))
                left += [
                    f"{state.stage.name}{f' of {name}' if name else ''} ({_left(state)})"
                    for state in states
                    if not state.complete
                ]
    except Stopped:
        print(f"stopped; {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        print(f"interrupted; {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    except Terminated:
        print(f"terminated; {again}", file=sys.stderr)
        raise typer.Exit(143) from None
    if cfg.sweep:
        page = _compare_sweep(cfg)
    if left:
        print(f"not done yet: {', '.join(left)}")
    print(f"report: {page} (all of it in {duration(time.monotonic() - began)})")


@app.command()
def plan(
    config_path: ConfigPath,
    overrides: Overrides = None,
    *,
    rates: Annotated[
        str | None, typer.Option(metavar="RUN", help="root of a run, such as a trial, for what has no rate yet")
    ] = None,
    gpus: Annotated[str, typer.Option(metavar="N,N,...", help="how long it takes on so many GPUs")] = "",
    cpus: Annotated[str, typer.Option(metavar="N,N,...", help="how long it takes on so many CPUs, without GPUs")] = "",
    as_json: AsJson = False,
) -> None:
    """What is cached, what would run, and what it will take: time, GPU hours, bytes, at the rates measured so far."""
    from vlcp_dist import plan as planning

    columns = [*planning.machines_of(gpus, gpus=True), *planning.machines_of(cpus, gpus=False)]
    states = _states(config.load(config_path, overrides))
    rows = planning.rows(states, planning.load_trial(rates) if rates else None, columns)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    header, *lines = planning.table(rows, columns)
    table = Table(*header)
    for line in lines:
        table.add_row(*line)
    _show(table)
    for row in rows:
        if row["no_rate"]:
            print(f"{row['stage']}: {row['no_rate']}")
    if any(row["units"] is None for row in rows):
        print("The index says which units there are: `vlcp run --only index` makes it.")
    elif any(row["done"] < row["units"] and not row["rate_from"] for row in rows):
        print("A trial measures the missing rates: `vlcp run --max-units 2`; docs/sizing.md has one of all stages.")


@app.command()
def status(
    config_path: ConfigPath,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="read every file again and compare its sha256")] = False,
    as_json: AsJson = False,
) -> None:
    """How far every stage is, from the markers and files alone. Exit code 0 only if all of it is done and intact."""
    cfg = config.load(config_path, overrides)
    from vlcp_dist.status import failures

    states = _states(cfg)
    rows = [state.summary() | {"stage": name} for name, state in states.items()]
    if verify:
        for state, row in zip(states.values(), rows, strict=True):
            row["corrupt"] = {
                f"{state.folder.path / file}": why for _, file, why in state.folder.verify(state.markers.values())
            }
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        table = Table("stage", "units", "samples", "failed", "MiB", "worker time", "samples/s")
        for row in rows:
            rate = f"{row['samples'] / row['worker_seconds']:.1f}" if row["worker_seconds"] else "-"
            units = "?" if row["units"] is None else row["units"]
            table.add_row(
                row["stage"],
                f"{row['done']} of {units}",
                str(row["samples"]),
                str(row["samples_failed"]),
                f"{row['bytes'] / 2**20:.1f}",
                f"{row['worker_seconds']:.1f} s",
                rate,
            )
        _show(table)
        for row in rows:
            for words, count in row["notices"].items():
                print(f"{row['stage']}: {count} {words}")
            for why, units in groupby(sorted(row["damaged"].items(), key=itemgetter(1)), key=itemgetter(1)):
                names = [name for name, _ in units]
                more = f" and {len(names) - 1} more units" if len(names) > 1 else ""
                print(f"{row['stage']}: {names[0]}{more} will be done again: {why}")
            for file, why in row.get("corrupt", {}).items():
                print(f"{row['stage']}: {file}: {why}; delete it and run again")
    failed = len(failures(states.values()))
    if failed > cfg.max_failed_samples:
        print(f"{failed} samples failed, more than max_failed_samples={cfg.max_failed_samples}", file=sys.stderr)
    incomplete = any(row["units"] is None or row["done"] < row["units"] or row.get("corrupt") for row in rows)
    if incomplete or failed > cfg.max_failed_samples:
        raise typer.Exit(1)


@app.command(name="report")
def report_command(config_path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write the report of what is done so far and print the results."""
    from vlcp_dist import pipeline, report

    cfg = config.load(config_path, overrides)
    results = {}
    for name, variant in config.variants(cfg).items():
        states = pipeline.status(variant)
        results[name] = report.results(states)
        page = report.write(variant, states, name)
    if cfg.sweep:
        page = _compare_sweep(cfg)
    if as_json:
        print(json.dumps(results if cfg.sweep else results[""], indent=2))
        return
    for name, records in results.items():
        if name:
            print(f"== {name}")
        _print_results(records)
    print(f"report: {page}")


@app.command()
def compare(
    roots: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="roots of runs: folders or URLs")],
    out: Annotated[str, typer.Option(help="the page to write")] = "compare.html",
) -> None:
    """Set runs side by side: accuracies, settings that differ, cost of each stage."""
    from vlcp_dist.data import storage
    from vlcp_dist.report import compare as comparison

    names = comparison.names_of(roots)
    runs = [comparison.load(storage.locate(root) / "report", name) for root, name in zip(roots, names, strict=True)]
    for net in sorted({record["net"] for run in runs for record in run.records}):
        rows = comparison.rows_of(net, runs)
        ipcs = list(dict.fromkeys(ipc for row in rows for ipc in row["cells"]))
        table = Table("run", "method", *(f"IPC {ipc}" for ipc in ipcs), title=net)
        for row in rows:
            table.add_row(row["run"], row["method"], *(row["cells"].get(ipc, {}).get("text", "-") for ipc in ipcs))
        _show(table)
    comparison.write(runs, storage.locate(out))
    print(f"comparison: {out}")


@app.command()
def doctor(config_path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Look at every node before a run: software, GPUs, network, storage, weights, room. Exit code 0: all is OK."""
    from vlcp_dist.doctor import Check, examine

    def show(check: Check) -> None:
        where = f"{check.node}: " if check.node else ""
        print(f"{'OK ' if check.ok else 'BAD'}  {check.name:<16}{where}{check.found}")
        if not check.ok:
            print(f"     {'':<16}-> {check.remedy}")

    found = examine(config.load(config_path, overrides), (lambda _: None) if as_json else show)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    if not found.ok:
        raise typer.Exit(1)


def main() -> None:
    """The console script: user errors become one message and exit code 1 or 2, never a traceback."""
    try:
        app()
    except ConfigError as error:
        sys.exit(_complain(error, code=2))
    except (InputError, StageFailed) as error:
        sys.exit(_complain(error, code=1))
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        sys.exit(_complain(f"{error}; mend that and run the same command again, what is done stays done", code=1))


def _complain(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def _states(cfg: config.Config) -> "dict[str, StageStatus]":
    """Every stage by its name; of a sweep each folder once, and what is not shared with the value it is for."""
    from vlcp_dist import pipeline

    states = {name: pipeline.status(variant) for name, variant in config.variants(cfg).items()}
    folders = Counter((state.stage.name, state.folder.path) for of_variant in states.values() for state in of_variant)
    found: dict[str, StageStatus] = {}
    for name, of_variant in states.items():
        for state in of_variant:
            shared = folders[state.stage.name, state.folder.path] == len(states)
            found[state.stage.name if shared else f"{state.stage.name} {name}"] = state
    return found


def _compare_sweep(cfg: config.Config) -> "storage.Location":
    """The page of a sweep: its runs compared."""
    from vlcp_dist.data import storage
    from vlcp_dist.report import compare as comparison

    folder = storage.locate(cfg.root) / "report"
    comparison.write([comparison.load(folder / name, name) for name in config.variants(cfg)], folder / "index.html")
    return folder / "index.html"


def _left(state: "StageStatus") -> str:
    return "units not known yet" if state.units is None else f"{len(state.todo)} of {len(state.units)} units"


def _show(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _print_results(results: list[dict[str, Any]]) -> None:
    from vlcp_dist import report

    table = Table("method", "IPC", "net", "top-1 best", "top-1 last", "seeds")
    for row in report.summarize(results):
        table.add_row(
            row["method"],
            str(row["ipc"]),
            row["net"],
            f"{row['best_mean']:.1f} ± {row['best_std']:.1f}",
            f"{row['last_mean']:.1f} ± {row['last_std']:.1f}",
            str(row["seeds"]),
        )
    _show(table)
