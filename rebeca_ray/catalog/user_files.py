"""Find the files of some users: user -> bucket -> the files whose range of users holds the user."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.identity import bucket_of


class File(NamedTuple):
    """One file of a table: its path below the root, its size, its first and last user.

    A file without rows has no users.
    """

    path: str
    bytes: int
    first_user: str | None
    last_user: str | None

    def may_hold(self, users: list[str]) -> bool:
        """Return whether any of the sorted users may be in the file."""
        if self.first_user is None or self.last_user is None:
            return False
        return users[0] <= self.last_user and users[-1] >= self.first_user


@dataclass(frozen=True, kw_only=True)
class UserFiles:
    """The files of every table with users, by table and bucket."""

    by_bucket: dict[tuple[str, int], list[File]]
    num_buckets: int

    @classmethod
    def of(cls, files: pa.Table, num_buckets: int) -> Self:
        """Sort a snapshot's `schemas.FILES` by table and bucket."""
        by_bucket: dict[tuple[str, int], list[File]] = {}
        for row in files.filter(pc.not_equal(files["table"], "images")).to_pylist():
            file = File(row["path"], row["bytes"], row["min_user_id"], row["max_user_id"])
            by_bucket.setdefault((row["table"], row["bucket"]), []).append(file)
        return cls(by_bucket=by_bucket, num_buckets=num_buckets)

    def files_with(self, name: str, users: list[str]) -> list[tuple[File, list[str]]]:
        """Return the files that may hold any of some sorted users, each with the users of its bucket."""
        users_of: dict[int, list[str]] = {}
        for user in users:
            users_of.setdefault(bucket_of(user, self.num_buckets), []).append(user)
        return [
            (file, users_of_bucket)
            for bucket, users_of_bucket in sorted(users_of.items())
            for file in self.by_bucket.get((name, bucket), [])
            if file.may_hold(users_of_bucket)
        ]
