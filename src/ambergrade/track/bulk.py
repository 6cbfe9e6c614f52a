"""Writes a new run's rows into a SQL database at once.

MLflow's own calls first read, row by row, what may be there already: three quarters of what a point costs. Here a row
that is there after all makes the database refuse the whole, and MLflow's call decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ambergrade.track.database import MlflowClient, entities

WAIT_MILLISECONDS = 20_000
"""For SQLite's other writers; as MLflow waits."""


def insert(
    client: MlflowClient, run_id: str, metrics: Sequence[entities.Metric], params: Sequence[entities.Param]
) -> bool:
    """Insert rows of keys that the run never had; False where `client.log_batch` must do it.

    False for a server, for a metric with several values, and where the database refuses (a key is there, a disk full).
    Raises MlflowException for what MLflow would refuse.
    """
    from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam
    from mlflow.utils.validation import _validate_batch_log_data, _validate_param_keys_unique
    from sqlalchemy.exc import DBAPIError

    store = _sql_store(client)
    if store is None or len({metric.key for metric in metrics}) < len(metrics):
        return False
    _validate_batch_log_data(metrics, params, [])
    _validate_param_keys_unique(params)
    values = [_metric(store, run_id, metric) for metric in metrics]
    settings = [{"run_uuid": run_id, "key": param.key, "value": param.value} for param in params]
    try:
        with store.engine.begin() as connection:
            if store.engine.dialect.name == "sqlite":
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {WAIT_MILLISECONDS}")
            for table, rows in ((SqlParam, settings), (SqlMetric, values), (SqlLatestMetric, values)):
                if rows:
                    connection.execute(table.__table__.insert(), rows)
    except DBAPIError:  # drivers disagree on what they call a key that is there; MLflow's call tells one that matters
        return False
    return True


def runs_of(client: MlflowClient, experiment_id: str, key: str) -> list[str] | None:
    """Ids of the experiment's runs with the tag ag.key, deleted ones left out; None for a server."""
    from mlflow.store.tracking.dbmodels.models import SqlRun, SqlTag
    from sqlalchemy import select

    store = _sql_store(client)
    if store is None:
        return None
    mine = (SqlRun.experiment_id == int(experiment_id), SqlRun.lifecycle_stage == "active")
    tagged = (SqlTag.key == "ag.key", SqlTag.value == key)
    with store.engine.connect() as connection:
        return list(connection.execute(select(SqlTag.run_uuid).join(SqlRun).where(*tagged, *mine)).scalars())


def _sql_store(client: MlflowClient) -> Any:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = client._tracking_client.store
    return store if isinstance(store, SqlAlchemyStore) else None


def _metric(store: Any, run_id: str, metric: entities.Metric) -> dict[str, Any]:
    is_nan, value = store.sanitize_metric_value(metric.value)
    when = {"timestamp": metric.timestamp, "step": metric.step}
    return {"run_uuid": run_id, "key": metric.key, "value": value, "is_nan": is_nan, **when}
