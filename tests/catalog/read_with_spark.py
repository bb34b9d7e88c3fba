"""Read Parquet files with Spark: `read_with_spark.py OUT NAME FILE[,FILE…] [NAME FILES]…`.

OUT is a pickle of each table's rows. Spark runs in a separate process, because its launcher forks. A process
with a connection to Ray may lose Ray's notifications by a fork, and then waits for ever for the next actor.
"""

import os
import pickle
import sys
import tempfile
from pathlib import Path


def main(out: str, *names_and_files: str) -> None:
    from pyspark.sql import SparkSession

    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as warehouse:
        session = (
            SparkSession.builder.master("local[1]")
            .config("spark.ui.enabled", "false")
            .config("spark.driver.memory", "1g")
            .config("spark.sql.session.timeZone", "UTC")
            .config("spark.sql.warehouse.dir", warehouse)
            .getOrCreate()
        )
        tables = zip(names_and_files[::2], names_and_files[1::2], strict=True)
        rows = {
            name: [row.asDict() for row in session.read.parquet(*files.split(",")).collect()]
            for name, files in tables
        }
        session.stop()
    Path(out).write_bytes(pickle.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
