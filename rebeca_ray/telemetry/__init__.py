"""Reports of a run to other systems: metrics, a summary, lineage events, traces, notifications.

May import: `catalog`, `config`, `ray_runtime`, and their imports.
Must not hold: decisions of a run. No report may fail or change a run.
"""
