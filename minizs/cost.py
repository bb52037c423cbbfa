"""What a run cost, beside what its searches would have cost (paper Table 8)."""


def of_run(rows: list[dict], search_price: float, gpu_price: float) -> dict:
    """Queries, device-hours and dollars of a run's metrics lines.

    Prices are those of 1,000 queries and of an hour of one device (a GPU, or a process on a CPU).
    Left out: a simulator's own device, checkpoints, and steps that a resumed run did again.
    """
    queries = sum(row["queries"] for row in rows)
    seconds = (row["processes"] * (row["seconds"] + row.get("seconds_test", 0)) for row in rows)
    hours = sum(seconds) / 3600
    searches, devices = queries / 1000 * search_price, hours * gpu_price
    return {"queries": queries, "search_dollars": searches, "device_hours": hours,
            "device_dollars": devices, "saved_dollars": searches - devices}  # fmt: skip


def describe(cost: dict) -> str:
    return ("{queries:,.0f} queries, ${search_dollars:,.2f} from a web engine; this run took "
            "{device_hours:,.2f} device-hours, ${device_dollars:,.2f}. Saved: "
            "${saved_dollars:,.2f}.").format(**cost)  # fmt: skip
