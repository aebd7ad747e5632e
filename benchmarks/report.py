"""Results on paper: the digest of what was measured, and its JSON, Markdown and plot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cuconv.measure import table

ROOT = Path(__file__).resolve().parent.parent

Result = dict[str, Any]
Row = dict[str, Any]


def sources_digest(root: Path = ROOT) -> str:
    """One sha256 over the files of cuda/ and cuconv/, in the order of their paths: path, zero, bytes, zero."""
    files = sorted(
        (file.relative_to(root).as_posix(), file)
        for folder in ("cuda", "cuconv")
        for file in (root / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    )
    digest = hashlib.sha256()
    for path, file in files:
        digest.update(path.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def merged(old: Result, new: Result) -> Result:
    """Rows of two runs of the same sources on the same machine; where both have one, the new."""
    for name in ("device", "sources", "versions"):
        if old[name] != new[name]:
            raise ValueError(f"results to add to must have this run's {name}, {new[name]}, and have {old[name]}")
    measured = {_key(row) for row in new["rows"]}
    rows = [row for row in old["rows"] if _key(row) not in measured] + new["rows"]
    return old | new | {"rows": rows}


def _key(row: Row) -> tuple[str, ...]:
    return row["op"], row["pass"], row["case"], row["dtype"], row["precision"], row["layout"]


def best_peer(row: Row) -> tuple[str, float] | None:
    """The fastest peer of a row, and its time."""
    times = {name: ms for name, ms in row["peers"].items() if ms is not None}
    return min(times.items(), key=lambda item: item[1]) if times else None


def read(folder: Path, name: str) -> Result:
    """What write has written."""
    result: Result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return result


def write(result: Result, folder: Path, name: str) -> None:
    """<name>.json and .md in the folder, and a plot of every pass of every operator: <name>.png of depthwise forward,
    <name>_<pass>.png of its gradients, <name>_<operator>_<pass>.png of any other."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(result, name), encoding="utf-8")
    for part in _parts(result):
        plot(result, part, folder / _plot_name(name, part))


Part = tuple[str, str]


def _parts(result: Result) -> list[Part]:
    """Every (operator, pass)."""
    return list(dict.fromkeys(map(_part, result["rows"])))


def _part(row: Row) -> Part:
    return row["op"], row["pass"]


def _plot_name(name: str, part: Part) -> str:
    words = [word for word in part if word != "depthwise"]
    return "_".join([name, *words]) + ".png" if words != ["forward"] else f"{name}.png"


def _format(row: Row) -> str:
    """The dtype, or the precision that it may be multiplied in."""
    return row["precision"] if row["precision"] != "fp32" else row["dtype"]


def markdown(result: Result, name: str) -> str:
    """What was measured on what, and for every pass of an operator its plot and a table with a line a row."""
    facts = "\n".join(f"- {name}: {value}" for name, value in result["versions"].items())
    return (
        (
            f"# {result['device']}, {result['date']}\n\n"
            f"A device-to-device copy reads and writes {_copies(result)} GB/s. The floor is every input read "
            f"once and every output written once at that rate; error is a fraction of the bound, of which 1 is still "
            f"right.\n\n"
            f"{facts}\n- sources: `{result['sources']}`\n"
        )
        + "".join(
            f"\n## {' '.join(part)}\n\n![% of floor, {' '.join(part)}]({_plot_name(name, part)})\n\n"
            f"{_table([row for row in result['rows'] if _part(row) == part])}\n"
            for part in _parts(result)
        )
        + (_calls(result["calls"]) if "calls" in result else "")
    )


def _copies(result: Result) -> str:
    """The bandwidth of a copy in every run that the rows are of."""
    return " and ".join(dict.fromkeys(f"{row['copy_GBps']:.0f}" for row in result["rows"]))


def _calls(calls: dict[str, Any]) -> str:
    """First calls, and the host's part of every call."""
    first = table(
        ["case", "pass", "dtype", "compiling, ms", "from the disk cache, ms"],
        [
            [row["case"], row["pass"], row["dtype"], _number(row["cold_ms"], ".0f"), _number(row["cached_ms"], ".1f")]
            for row in calls["first"]
        ],
    )
    host = table(["call", "host, us"], [[name, _number(us, ".1f")] for name, us in calls["host_us"].items()])
    return (
        f"\n## calls\n\nThe first call of a shape, to the end of its kernel:\n\n{first}\n\n"
        f"The host's part of a call on (1, 16, 14, 14), 3x3, once planned:\n\n{host}\n"
    )


def _table(rows: list[Row]) -> str:
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"]))
    header = ["case", "shape", "dtype", "layout", "kernel", "error", "floor ms", "ms", "% of floor"]
    lines = [
        [
            row["case"],
            row["shape"],
            _format(row),
            row["layout"],
            row["kernel"] or "-",
            _number(row["error"], ".3f") if row["right"] else "WRONG",
            _number(row["floor_ms"], ".4f"),
            _number(row["ms"], ".4f"),
            _number(row["percent_of_floor"], ".1f"),
            *(_number(row["peers"].get(peer), ".4f") for peer in peers),
        ]
        for row in rows
    ]
    return table([*header, *(f"{peer} ms" for peer in peers)], lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(result: Result, part: Part, path: Path) -> None:
    """% of floor in one pass, a panel for every dtype that most cases have, beside that of the best peer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if _part(row) == part and row["percent_of_floor"] is not None]
    labels = list(dict.fromkeys(map(_label, rows)))
    dtypes = [
        dtype
        for dtype in dict.fromkeys(map(_format, rows))
        if 2 * sum(_format(row) == dtype for row in rows) > len(labels)
    ]
    width, height = 2 + 4.5 * max(1, len(dtypes)), 1.8 + 0.42 * len(labels)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(dtypes)), sharey=True, squeeze=False)[0]
    for panel, dtype in zip(panels, dtypes, strict=False):
        # Of every row: where it stands, its % of floor and the text at its end.
        ours: list[tuple[float, float, str]] = []
        best: list[tuple[float, float, str]] = []
        for row in rows:
            if _format(row) == dtype:
                y, share = labels.index(_label(row)), row["percent_of_floor"]
                ours.append((y - 0.2, share, f"{share:.0f}"))
                if peer := best_peer(row):
                    share = 100 * row["floor_ms"] / peer[1]
                    best.append((y + 0.2, share, f"{share:.0f} {peer[0]}"))
        for bars, color, label in ((ours, "#2a6fbb", "cuconv"), (best, "#b9bec5", "best peer")):
            panel.barh([y for y, *_ in bars], [share for _, share, _ in bars], 0.38, color=color, label=label)
            for y, share, text in bars:
                panel.text(share + 1, y, text, va="center", fontsize=8, color="#333333")
        panel.axvline(100, color="#888888", linewidth=0.8, linestyle=":")
        panel.set(title=dtype, xlabel="% of floor", xlim=(0, 125), xticks=range(0, 101, 20))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    if dtypes:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"{result['device']}, {' '.join(part)}: longer is better, 100 is a copy of the same bytes", fontsize=11
    )
    figure.savefig(path, dpi=110)


def _label(row: Row) -> str:
    """The case, and a layout that is not the usual one."""
    return row["case"] if row["layout"] == "nchw" else f"{row['case']} {row['layout']}"
