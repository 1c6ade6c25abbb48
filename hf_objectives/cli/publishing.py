"""`hf-objectives push` and `verify`: a run to the Hub, and the figures of a published model measured again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_objectives.cli.options import PushOptions, VerifyOptions
from hf_objectives.inspection import visible
from hf_objectives.publishing import files_to_push
from hf_objectives.publishing import push as push_folder
from hf_objectives.recipes import verify as verify_figures


def push(options: PushOptions) -> None:
    """Push a run and print where it is."""
    folder = Path(options.folder)
    url = push_folder(folder, options.hub_model_id, private=options.private, revision=options.revision)
    if options.json:
        print(json.dumps({"url": url, "files": files_to_push(folder)}, indent=1))
    else:
        print(f"Pushed to {url}")


def verify(options: VerifyOptions) -> int:
    """Print the checks; 1 where something does not hold."""
    checks = verify_figures(
        options.model,
        revision=options.revision,
        data_dir=options.data_dir,
        use_cpu=options.use_cpu,
        trust_remote_code=options.trust_remote_code,
    )
    wrong = [check for check in checks if not check.holds]
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
        return int(bool(wrong))
    table = Table("", "published", "found", "", header_style="bold")
    for check in checks:
        verdict = Text("holds", style="green") if check.holds else Text("does not hold", style="bold red")
        table.add_row(visible(check.name), _shown(check.published), _shown(check.found), verdict)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{len(checks) - len(wrong)} of {len(checks)} hold" + (f", {len(wrong)} do not" if wrong else ""))
    return int(bool(wrong))


def _shown(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else visible(str(value))
