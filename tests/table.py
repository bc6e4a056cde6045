"""Prints finished runs side by side, in the paper's columns, as a Markdown table.

    python tests/table.py runs/fpn runs/lv_seed0 runs/lv_seed1 runs/lv_seed2

A run is its folder (its last finished stage counts) or a checkpoint. Rows are named by the options
in which the runs differ; runs that differ in nothing but the seed share a row, mean ± sd.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import InputError, columns_of  # noqa: E402
from hmpl import WeightsError, load_checkpoint  # noqa: E402

# told apart by `steps`, or of no effect on the scores
ASIDE = {"seed", "data", "amp", "accum", "epochs", "origin", "images", "labels_of"}


def read_run(path: Path) -> tuple[dict, dict]:
    """Options and scores of a run; the options with stage and number of steps."""
    files = [path / f"{stage}.pt" for stage in ("finetune", "adapt")] if path.is_dir() else [path]
    for file in files:
        if file.exists():
            saved = load_checkpoint(file)
            if saved["scores"]:
                config = {**saved["config"], "stage": saved["stage"], "steps": saved["steps"]}
                return config, saved["scores"]
    raise InputError(f"{path} holds no stage that is finished and scored: run it to its end, or "
                     "leave it out.")


def cell(values: list[float | None]) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def table(paths: list[Path]) -> str:
    runs = [read_run(path) for path in paths]
    options = sorted(set().union(*(config for config, _ in runs)) - ASIDE)
    differing = [key for key in options if len({repr(config.get(key)) for config, _ in runs}) > 1]
    rows = {}
    for config, scores in runs:
        name = ", ".join(f"{key} {config.get(key)}" for key in differing) or config["stage"]
        rows.setdefault(name, []).append(scores)
    columns = columns_of({task: values for _, scores in runs for task, values in scores.items()})
    lines = ["| | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, scores in rows.items():
        cells = [cell([one.get(task, {}).get(key) for one in scores])
                 for task, key in columns.values()]
        lines.append(f"| {name} | {len(scores)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        print(table([Path(arg) for arg in sys.argv[1:]]))
    except (InputError, WeightsError) as error:
        sys.exit(f"table.py: {error}")
