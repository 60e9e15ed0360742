"""How long, how many machines, how much storage and memory, and what it costs: for any number of photographs.

    python benchmarks/capacity.py [--pictures 1e7 1e8 1e9] [--days 7] [--core-second 0.0129] ...

Arithmetic, from what was measured for one photograph; every number is an option, so put in your own. The formulas are
those of docs/scale.md.
"""

import argparse

from common import table

MB, GB, TB = 1e6, 1e9, 1e12


def plan(pictures, given):
    """The figures for some number of pictures."""
    core_seconds = pictures * given.core_second
    cores = core_seconds / (given.days * 86_400)
    table_bytes = pictures * (given.dim * 4 + given.row_bytes)
    index_bytes = pictures * (given.dim / 8 + given.index_row)
    return {
        "core_hours": core_seconds / 3600,
        "machines": cores / given.cores,
        "index_hours": pictures * given.index_second / 3600,
        "read_mb_s": pictures * given.picture_kb * 1e3 / (given.days * 86_400) / MB,
        "table_tb": table_bytes / TB,
        "index_gb": index_bytes / GB,
        "float32_gb": pictures * given.dim * 4 / GB,
        "int8_gb": pictures * given.dim / GB,
        "bits_gb": pictures * given.dim / 8 / GB,
        "embed_cost_per_million": 1e6 * given.core_second / 3600 * given.core_hour,
        "request_cost_per_million": given.requests * given.million_requests,
        "store_cost_per_month": (table_bytes + index_bytes) / GB * given.gb_month,
    }


NAMES = {
    "core_hours": "core hours to embed",
    "machines": "machines for that, in the days given",
    "index_hours": "hours of one machine to build the indexes, if in proportion",
    "read_mb_s": "MB/s read from storage meanwhile",
    "table_tb": "table, TB (float32 rows and what is known of the pictures)",
    "index_gb": "index of neighbours, GB (memory of a query node that keeps it all)",
    "float32_gb": "rows alone, GB: float32",
    "int8_gb": "rows alone, GB: int8",
    "bits_gb": "rows alone, GB: one bit a number",
    "embed_cost_per_million": "cost to embed a million pictures",
    "request_cost_per_million": "cost of the requests for them",
    "store_cost_per_month": "cost to keep table and index, a month",
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=float, nargs="+", default=[1e7, 1e8, 1e9])
    parser.add_argument("--core-second", type=float, default=0.0169, help="core seconds a picture: 118.5/s on 2 cores")
    parser.add_argument("--picture-kb", type=float, default=247, help="size of a picture on storage")
    parser.add_argument("--dim", type=int, default=256, help="numbers of a row")
    parser.add_argument(
        "--row-bytes", type=float, default=303, help="of a photograph, but for its row and the index of that"
    )
    parser.add_argument("--index-row", type=float, default=17, help="bytes a row in the index, besides its bits")
    parser.add_argument("--index-second", type=float, default=1.4e-5, help="seconds a row to build the indexes")
    parser.add_argument("--days", type=float, default=1, help="in which to embed all")
    parser.add_argument("--cores", type=int, default=32, help="of a machine")
    parser.add_argument("--core-hour", type=float, default=0.02, help="price of a core for an hour")
    parser.add_argument("--requests", type=float, default=2, help="to storage for a picture: its size, its bytes")
    parser.add_argument("--million-requests", type=float, default=0.4, help="price of a million of them")
    parser.add_argument("--gb-month", type=float, default=0.023, help="price of a GB of object storage for a month")
    return parser.parse_args()


def main():
    given = parse()
    columns = [plan(count, given) for count in given.pictures]
    rows = [[text, *(f"{column[name]:,.4g}" for column in columns)] for name, text in NAMES.items()]
    print(table(["pictures", *(f"{count:,.0f}" for count in given.pictures)], rows))


if __name__ == "__main__":
    main()
