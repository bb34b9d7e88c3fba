"""Settings about people: the columns of their ratings, and the key of their pseudonyms."""

from typing import Annotated, Any, Self

from pydantic import model_validator

from rebeca_ray.config.fields import Effect, KeySource, Settings, key_source


class ColumnNames(Settings):
    """The names of the columns in the files of ratings, where they differ from the usual ones."""

    user_id: Annotated[str | None, Effect.CONTENT] = None
    """Column of the users. By default, it is `user_id`."""
    item_id: Annotated[str | None, Effect.CONTENT] = None
    """Column of the items. By default, it is `item_id`."""
    rating: Annotated[str | None, Effect.CONTENT] = None
    """Column of the ratings. By default, it is `rating`, if there is one."""
    timestamp: Annotated[str | None, Effect.CONTENT] = None
    """Column of the times. By default, it is `timestamp`, if there is one."""
    event: Annotated[str | None, Effect.CONTENT] = None
    """Column of the events. By default, it is `event`, if there is one."""

    @model_validator(mode="after")
    def check_names(self) -> Self:
        names = [name for name in self.model_dump().values() if name is not None]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{repeated[0]} is named twice; name each column once")
        return self


class PeopleConfig(Settings):
    """The base of the configs of jobs that read tables of people."""

    user_key: Annotated[KeySource | None, Effect.NOTHING] = None
    """Key of the pseudonyms: a file on every node, or `env:NAME`. Every `user_id` that the job reads is
    replaced by its keyed hash. By default, user ids stay as they are."""

    @model_validator(mode="before")
    @classmethod
    def give_the_key_to_interactions(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("user_key") is None:
            return values
        ratings, key = values.get("interactions"), {"user_key": values["user_key"]}
        if isinstance(key["user_key"], str):
            try:
                key = {"user_key": key_source(key["user_key"])}  # `model_copy` checks nothing
            except ValueError:
                return values  # the field refuses it, by its name
        if isinstance(ratings, Settings) and getattr(ratings, "user_key", None) is None:
            ratings = ratings.model_copy(update=key)
        elif isinstance(ratings, dict) and ratings.get("user_key") is None:
            ratings = {**ratings, **key}
        return {**values, "interactions": ratings} if "interactions" in values else values

    @model_validator(mode="after")
    def check_the_key(self) -> Self:
        ratings = getattr(self, "interactions", None)
        if ratings is not None and ratings.user_key != self.user_key:
            raise ValueError("interactions.user_key differs from user_key; set user_key alone")
        return self
