"""Output of ``status``: a few lines for people, or one JSON object."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

from nemotron_fp8._utils import format_bytes
from nemotron_fp8.cli.output import print_json, say
from nemotron_fp8.cli.progress_line import clock_time

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.destinations.status import Status

SHOWN_ACTIVE = 8
"""Shards in progress that are named."""
WHAT = {"evaluation": "layers"}
WORDS = {"none": "no conversion", "unknown": "unfinished", "complete": "complete"}


def show_status(status: Status, as_json: bool) -> None:
    """Print a state."""
    if as_json:
        print_json(status.as_dict())
        return
    say(f"{status.destination}: {headline(status)}")
    for label, text in rows(status):
        say(f"  {label:<12}{text}")


def headline(status: Status) -> str:
    """Return the state in one line."""
    process = status.process
    if status.state not in ("running", "stopped") or process is None:
        return WORDS.get(status.state, status.state)
    who = f"process {process.pid} on {process.host}"
    if status.state == "stopped":
        return f"stopped ({who} has ended)"
    since = "" if process.since is None else f" since {moment(process.since)}"
    return f"{'suspended' if process.suspended else 'running'}, by {who}{since}"


def rows(status: Status) -> Iterator[tuple[str, str]]:
    """Yield label and text of every line below the headline."""
    if status.kind:
        yield WHAT.get(status.kind, "shards"), _counts(status)
    if status.measured:
        yield "measured", f"{status.measured:,} shards, before the first is replaced"
    if status.bytes_done or status.bytes_total:
        yield "bytes", _bytes(status)
    speeds = [
        f"{format_bytes(speed)}/s {over}"
        for speed, over in (
            (status.bytes_per_second, "over this run"),
            (status.recent_bytes_per_second, "over the last shards"),
        )
        if speed is not None
    ]
    if speeds and status.state != "complete":
        yield "speed", ", ".join(speeds)
    if status.seconds_left is not None and status.state != "complete":
        when = "" if status.state == "running" else " once it is resumed"
        yield "time left", f"about {clock_time(status.seconds_left)}{when}"
    if status.last is not None and status.idle_seconds is not None:
        yield "last entry", f"{clock_time(status.idle_seconds)} ago, at {moment(status.last)}"
    if status.active:
        more = len(status.active) - SHOWN_ACTIVE
        yield "now", ", ".join(status.active[:SHOWN_ACTIVE]) + (f" and {more:,} more" if more > 0 else "")
    for label, text in (("source", status.source), ("recipe", _recipe(status)), ("plan", status.plan[:16])):
        if text:
            yield label, text
    for label, text in (("error", status.error), ("command", status.command if status.state == "running" else "")):
        if text:
            yield label, text
    yield from (("note", notice) for notice in status.notices)
    if status.advice:
        yield "note" if status.state == "none" else "next", status.advice


def _counts(status: Status) -> str:
    done, total = status.shards_done, status.shards_total
    if total is None:
        return f"{done:,} done; how many there will be is not recorded"
    return f"{done:,} of {total:,} done" + (f", {status.shards_left:,} left" if status.shards_left else "")


def _bytes(status: Status) -> str:
    if status.bytes_total is None:
        return f"{format_bytes(status.bytes_done)} done"
    left = f", {format_bytes(status.bytes_left or 0)} left" if status.bytes_left else ""
    return f"{format_bytes(status.bytes_done)} of {format_bytes(status.bytes_total)} done{left}"


def _recipe(status: Status) -> str:
    """Return the settings of a recipe that are neither off nor empty."""
    shown = {name: value for name, value in status.recipe.items() if value not in (False, None, "none", "", [], ())}
    return ", ".join(f"{name} {_setting(value)}" for name, value in shown.items())


def _setting(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "on" if value is True else str(value)


def moment(seconds: float) -> str:
    """Format a time in seconds since 1970 as date and time in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
