"""Format a comparison of groups of users, as a table or as JSON."""

from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rebeca_ray.evaluation.groups import FIGURES, Figure, GroupReport
from rebeca_ray.storage.objects import JsonObject


def groups_json(report: GroupReport) -> JsonObject:
    """Return the report with plain numbers. A figure that no user has is null."""
    return asdict(report)


def groups_table(report: GroupReport) -> RenderableType:
    """Return a row per group. A star marks an interval without the mean over all users."""
    table = Table("group", title=f"Groups in run {report.run_id} of {report.run_date}")
    for name in ("users", "items", *FIGURES):
        table.add_column(name.replace("_", " "), justify="right")
    for group in (report.everybody, *report.groups):
        merged = f" of {group.merged}" if group.merged > 1 else ""
        cells = [shown(group.figures[name]) for name in FIGURES]
        table.add_row(escape(group.group + merged), f"{group.users:,}", f"{group.items:,}", *cells)
    note = "means over users [95% bootstrap interval]; * the interval leaves out the mean over all users"
    return Group(table, Text(note))


def shown(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return escape(f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]") + "*" * figure.differs
