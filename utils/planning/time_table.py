"""Estimated times in words and tables, for ``python -m utils.plan --time`` and ``--dry_run``."""

from utils.planning.machines import GRAPH_LAUNCH, Cluster
from utils.planning.step_time import StepTime, hours

ASSUMED = {
    "own": "this project's loop: whole weights on every rank, its kernels started one by one",
    "vllm": "an engine of vLLM: weights handed over in each round, kernels started together "
    f"({GRAPH_LAUNCH * 1e3:g} ms a layer), its cache in the share of memory it is given",
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


def generation_seconds(step: StepTime) -> float:
    return sum(piece.seconds for piece in step.pieces if piece.name.startswith("generation"))


def backend_lines(ways: dict[str, tuple[StepTime, float, bool] | str]) -> list[str]:
    """Backends of generation side by side: (time, GiB of a device at most, whether it fits), or why not."""
    lines = ["", f"{'--hybrid_engine_backend':26}{'generation s':>13}{'step s':>9}{'device GiB':>12}  assumed"]
    for name, way in ways.items():
        if isinstance(way, str):
            lines.append(f"  {name:24}{'-':>13}{'-':>9}{'-':>12}  {way}")
            continue
        step, memory, fits = way
        note = "" if fits else "too large; "
        lines.append(
            f"  {name:24}{generation_seconds(step):13.2f}{step.seconds:9.2f}{memory:12.1f}  {note}{ASSUMED[name]}"
        )
    return lines


def _places(values: dict[int, float]) -> dict[int, int]:
    """Which of the values is the smallest (1), the next one (2), and so on, by key."""
    return {key: place for place, key in enumerate(sorted(values, key=values.get), start=1)}


Row = tuple[int, str | None, tuple[StepTime, object] | str]  # devices, backend, (time, candidate) or why there is none


def scaling_table(rows: list[Row], data: int | None, price: float | None) -> list[str]:
    """A line for each number of devices and backend: the best way there, its place by time and by price among all.

    Args:
        rows: with the Candidate of a plan. data: rows to train on. price: of a device and hour.
    """
    timed = {number: row for number, (*_, row) in enumerate(rows) if not isinstance(row, str)}
    by_time = _places({number: step.seconds for number, (step, _) in timed.items()})
    by_price = _places({number: step.seconds * rows[number][0] for number, (step, _) in timed.items()})
    with_backends = any(backend for _, backend, _ in rows)
    head = " GPUs" + ("  backend" if with_backends else "") + "  ZeRO  offload  checkp.  micro x accum."
    head += ("  generation s" if with_backends else "") + "   s/step   tokens/s    MFU"
    head += "" if data is None else "    hours  GPU-hours" + ("" if price is None else "      price")
    lines = [f"{head}  by time  by price  waits most for"]
    for number, (gpus, backend, row) in enumerate(rows):
        line = f"{gpus:5}" + (f"  {backend or '':7}" if with_backends else "")
        if isinstance(row, str):
            lines.append(f"{line}  {row}")
            continue
        step, way = row
        line += f"  {way.stage:4}  {'yes' if way.offload else 'no':>7}  {'yes' if way.checkpointing else 'no':>7}"
        line += f"  {f'{way.micro} x {way.accumulation}':>14}"
        line += f"  {generation_seconds(step):12.2f}" if with_backends else ""
        line += f"  {step.seconds:7.2f}  {step.tokens_per_second:9,.0f}  {step.mfu:5.1%}"
        if data is not None:
            took = hours(step, data)
            line += f"  {took:7.2f}  {gpus * took:9,.1f}" + ("" if price is None else f"  {gpus * took * price:9,.0f}")
        lines.append(f"{line}  {by_time[number]:7}  {by_price[number]:8}  {step.limit}")
    if with_backends:
        lines += ["", *(f"{name}: {assumed}" for name, assumed in ASSUMED.items())]
    return lines
