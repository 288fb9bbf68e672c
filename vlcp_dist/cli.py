"""The `vlcp` command: run, plan, status and report."""

import json
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlcp_dist import config
from vlcp_dist.errors import ConfigError, InputError, StageFailed

app = typer.Typer(
    help="Distil a large labelled image dataset into a tiny synthetic one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigPath = Annotated[str, typer.Option("--config", "-c", help="the YAML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as ipc=[10,50] root=runs/a")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable")]


@app.command()
def run(
    config_path: ConfigPath,
    overrides: Overrides = None,
    print_config: Annotated[bool, typer.Option(help="show the whole configuration and stop")] = False,
    progress_interval: Annotated[
        float,
        typer.Option(min=0, help="seconds between lines where there is no terminal; 0: a line per unit"),
    ] = 10.0,
) -> None:
    """Do everything that is not done yet, then write the report. Exit code 0 only if all of it is done."""
    cfg = config.load(config_path, overrides)
    if print_config:
        print(json.dumps(cfg.model_dump(mode="json"), indent=2))
        return
    from vlcp_dist import pipeline, report
    from vlcp_dist.engine.progress import Progress, duration

    began = time.monotonic()
    try:
        states = pipeline.run(cfg, Progress(interval=progress_interval))
    except KeyboardInterrupt:
        print("interrupted; what is done stays done: the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    page = report.write(cfg, states)
    _print_results(report.results(states))
    print(f"report: {page} (all of it in {duration(time.monotonic() - began)})")


@app.command()
def plan(config_path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """What is cached, what would run, and how long one worker would need at the rates measured so far."""
    from vlcp_dist.engine.progress import duration

    rows = _summaries(config_path, overrides)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("stage", "units cached", "units to run", "samples to run", "worker time", "folder")
    for row in rows:
        if row["units"] is None:
            table.add_row(row["stage"], "?", "after the index", "?", "?", row["folder"])
            continue
        seconds = row["worker_seconds_left"]
        left = row["units"] - row["done"]
        needed = "no rate yet" if seconds is None else duration(seconds)
        table.add_row(
            row["stage"],
            str(row["done"]),
            str(left),
            str(row["samples_left"]),
            needed if left else "-",
            row["folder"],
        )
    _show(table)


@app.command()
def status(config_path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """How far every stage is, from the markers and files on disk. Exit code 0 only if all of it is done."""
    rows = _summaries(config_path, overrides)
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
    if any(row["units"] is None or row["done"] < row["units"] for row in rows):
        raise typer.Exit(1)


@app.command(name="report")
def report_command(config_path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write the report of what is done so far and print the results."""
    from vlcp_dist import pipeline, report

    cfg = config.load(config_path, overrides)
    states = pipeline.status(cfg)
    results = report.results(states)
    page = report.write(cfg, states)
    if as_json:
        print(json.dumps(results, indent=2))
        return
    _print_results(results)
    print(f"report: {page}")


def main() -> None:
    """The console script: user errors become one message and exit code 1 or 2, never a traceback."""
    try:
        app()
    except ConfigError as error:
        sys.exit(_complain(error, code=2))
    except (InputError, StageFailed) as error:
        sys.exit(_complain(error, code=1))


def _complain(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def _summaries(config_path: str, overrides: list[str] | None) -> list[dict[str, Any]]:
    from vlcp_dist import pipeline

    return [state.summary() for state in pipeline.status(config.load(config_path, overrides))]


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
