"""Tables and Weights & Biases: a finished table as a `wandb.Table`, and runs read from there.

`results/runs/` stays the truth: what Weights & Biases has is a mirror of it.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.rendering import Table
from experiments.selection import Run
from multimax.training.config import hashed_settings, read_config
from multimax.training.loggers import PROJECT, wandb_mode
from multimax.training.studies import Study

log: logging.Logger = logging.getLogger(__name__)

UNWANTED = {"debug", "tuning"}  # tags of runs that are no results
OUTPUTS = Path("outputs")  # where Weights & Biases keeps its own files


def log_table(table: Table, study: Study, figures: Iterable[Path] = (), wandb: Any = None) -> str:
    """Log a table and the figures of its study as a run of the job type "table".

    Args:
        table: the finished table.
        study: its name is the group of the run, as of the runs of its cells.
        figures: PNG files, which are logged as "figures/<name>".
        wandb: the package, or what stands for it.

    Returns:
        Where it went.

    Raises:
        ValueError: Weights & Biases cannot be reached.
    """
    if wandb is None:
        import wandb
    OUTPUTS.mkdir(exist_ok=True)
    try:
        run = wandb.init(
            project=PROJECT,
            dir=OUTPUTS.resolve(),  # its own process can have another working folder
            mode=wandb_mode("auto", wandb),
            group=study.name,
            job_type="table",
            name=table.name,
            tags=[study.name, "table"],
            config={"caption": table.caption},
        )
    except wandb.errors.Error as error:
        raise ValueError(f"Weights & Biases: {error}; offline: WANDB_MODE=offline") from error
    rows = [[row[column] for column in table.columns] for row in table.rows]
    content: dict[str, Any] = {table.name: wandb.Table(columns=table.columns, data=rows)}
    for file in figures:
        content[f"figures/{file.stem}"] = wandb.Image(str(file))
    run.log(content)
    run.summary["remarks"] = table.remarks
    run.finish()
    return f"{table.name}: {run.url or run.dir}"


def runs_of(project: str, api: Any = None) -> list[Run]:
    """The finished runs of a project, as tables need them; a warning names what is left out.

    A run that diverged is not finished there: only its JSON file counts in a table.

    Args:
        project: "ENTITY/PROJECT".
        api: of Weights & Biases, or what stands for it.

    Raises:
        ValueError: the project cannot be read.
    """
    if api is None:
        import wandb

        api = wandb.Api()
    try:
        found = list(api.runs(project))
    except Exception as error:  # of its client, which has many kinds
        raise ValueError(f"cannot read {project} from Weights & Biases: {error}") from error
    ours = [run for run in found if "seed" in run.config and not UNWANTED & set(run.tags)]
    runs = []
    for run in ours:
        if run.state != "finished":
            log.warning("run %s of W&B is %s, and left out", run.name, run.state)
            continue
        try:
            runs.append(_run(run))
        except ValueError as error:  # of another program, or of an old version
            log.warning("run %s of W&B cannot be read, and is left out: %s", run.name, error)
    return runs


def _run(run: Any) -> Run:
    config = read_config(dict(run.config))
    summary: dict[str, Any] = dict(run.summary)
    figures = {name: float(v) for name, v in summary.items() if isinstance(v, int | float)}
    return Run(hashed_settings(config), config.seed, figures, f"run {run.name} of W&B")
