"""Estimated times in words and tables, for ``python -m utils.plan --time`` and ``--dry_run``."""

from utils.planning.machines import GRAPH_LAUNCH, Cluster
from utils.planning.step_time import StepTime, hours

ASSUMED = {
    "own": "this project's loop: whole weights on every rank, its kernels started one by one",
    "vllm": f"vLLM: weights handed over in each round, kernels started together ({GRAPH_LAUNCH * 1e3:g} ms a layer), "
    "its cache in the share of memory it is given",
}


def row_of(step: StepTime, gpus: int, rows: int | None, price: float | None) -> dict:
    """The figures of a plan as JSON has them. rows: to train on. price: of one device and hour."""
    row = {
        "step_seconds": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "mfu": step.mfu,
        "limit": step.limit,
        "seconds_by_part": step.by("name"),
        "seconds_by_limit": step.by("limit"),
    }
    if rows is not None:
        row |= {"hours": hours(step, rows), "gpu_hours": gpus * hours(step, rows)}
        row |= {} if price is None else {"price": price * row["gpu_hours"]}
    return row


def _total(step: StepTime, gpus: int, rows: int | None, price: float | None) -> str:
    if rows is None:
        return "give --rows for hours" + ("" if price is None else f"; {gpus * price:,.2f} an hour")
    took = hours(step, rows)
    money = "" if price is None else f", price {gpus * took * price:,.2f}"
    return f"{rows:,} rows: {took:,.2f} hours, {gpus * took:,.1f} GPU-hours{money}"


def time_lines(step: StepTime, gpus: int, cluster: Cluster, rows: int | None, price: float | None) -> list[str]:
    """A step taken apart, then its totals and what they rest on."""
    parts, limits = step.by("name"), {}
    for name in parts:
        sums = {}
        for piece in step.pieces:
            if piece.name == name:
                sums[piece.limit] = sums.get(piece.limit, 0.0) + piece.seconds
        limits[name] = max(sums, key=sums.get)
    lines = [f"{'estimated seconds of a step':34}{'seconds':>9}{'share':>7}  waits for"]
    for name, seconds in parts.items():
        lines.append(f"  {name:32}{seconds:9.3f}{seconds / step.seconds:7.1%}  {limits[name]}")
    used = cluster.efficiency
    return [
        *lines,
        f"  {'whole step':32}{step.seconds:9.3f}{1:7.0%}  {step.limit}",
        "",
        f"{step.tokens_per_second:,.0f} tokens/s, MFU {step.mfu:.1%}; {_total(step, gpus, rows, price)}",
        f"(an estimate, every row at full length, with {used.compute:.3g} of the operations, {used.bandwidth:.3g} of "
        f"the memory's and {used.network:.3g} of the links' bytes per second of the data sheet, "
        f"{used.launch * 1e3:.3g} ms per layer)",
    ]


def backend_lines(ways: dict[str, tuple[StepTime, float, bool] | str]) -> list[str]:
    """Backends of generation side by side: (time, GiB of a device at most, whether it fits), or why not."""
    lines = ["", f"{'--hybrid_engine_backend':26}{'generation s':>13}{'step s':>9}{'device GiB':>12}  assumed"]
    for name, way in ways.items():
        if isinstance(way, str):
            lines.append(f"  {name:24}{'-':>13}{'-':>9}{'-':>12}  {way}")
            continue
        step, memory, fits = way
        generation = sum(seconds for part, seconds in step.by("name").items() if part.startswith("generation"))
        note = "" if fits else "too large; "
        lines.append(f"  {name:24}{generation:13.2f}{step.seconds:9.2f}{memory:12.1f}  {note}{ASSUMED[name]}")
    return lines


def _ranks(values: dict[int, float]) -> dict[int, int]:
    return {key: place for place, key in enumerate(sorted(values, key=values.get), start=1)}


def scaling_table(rows: dict[int, tuple[StepTime, object] | str], data: int | None, price: float | None) -> list[str]:
    """A line for each number of devices: the best way there (a plan's Candidate), its place by time and by price.

    Args:
        rows: devices -> (time, candidate), or why there is none. data: rows to train on. price: of a device and hour.
    """
    timed = {gpus: row[0] for gpus, row in rows.items() if not isinstance(row, str)}
    by_time = _ranks({gpus: step.seconds for gpus, step in timed.items()})
    by_price = _ranks({gpus: step.seconds * gpus for gpus, step in timed.items()})
    head = " GPUs  ZeRO  offload  checkp.  micro x accum.   s/step   tokens/s    MFU"
    head += "" if data is None else "    hours  GPU-hours" + ("" if price is None else "      price")
    lines = [f"{head}  by time  by price  waits most for"]
    for gpus, row in rows.items():
        if isinstance(row, str):
            lines.append(f"{gpus:5}  {row}")
            continue
        step, way = row
        line = (
            f"{gpus:5}  {way.stage:4}  {'yes' if way.offload else 'no':>7}  {'yes' if way.checkpointing else 'no':>7}"
        )
        line += f"  {f'{way.micro} x {way.accumulation}':>14}  {step.seconds:7.2f}  {step.tokens_per_second:9,.0f}"
        line += f"  {step.mfu:5.1%}"
        if data is not None:
            took = hours(step, data)
            line += f"  {took:7.2f}  {gpus * took:9,.1f}" + ("" if price is None else f"  {gpus * took * price:9,.0f}")
        lines.append(f"{line}  {by_time[gpus]:7}  {by_price[gpus]:8}  {step.limit}")
    return lines
