"""What a run cost, beside what its searches would have cost (paper Table 8)."""


def of_run(rows: list[dict], devices: int, search_price: float, gpu_price: float) -> dict:
    """Queries, device-hours and dollars of a run's metrics lines.

    Prices are those of 1,000 queries and of an hour of one device (a GPU, or a process on a CPU).
    A served simulator's own machine is not counted: it is not known here.
    """
    queries = sum(row["queries"] for row in rows)
    hours = devices * sum(row["seconds"] for row in rows) / 3600
    return {"queries": queries, "search_dollars": queries / 1000 * search_price,
            "device_hours": hours, "device_dollars": hours * gpu_price}  # fmt: skip


def describe(cost: dict) -> str:
    return ("{queries:,.0f} queries, ${search_dollars:,.2f} from a web engine; this run took "
            "{device_hours:,.2f} device-hours, ${device_dollars:,.2f}.").format(**cost)  # fmt: skip
